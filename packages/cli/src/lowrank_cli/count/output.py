"""What is counted, as JSON and CSV."""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowrank_cli.count.counting import Counted
from lowrank_core.errors import LowrankError


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Federated rounds: every participant gets and sends what travels once a round (FedPara, section 3.2)."""

    rounds: int
    clients_per_round: int

    def bytes_per_round(self, transferred_bytes: int) -> int:
        return 2 * self.clients_per_round * transferred_bytes


def as_tree(
    counted: Counted, dtype: str, number_bytes: int, batch_size: int, traffic: Traffic | None
) -> dict[str, Any]:
    """The JSON object of one case."""
    report, arithmetic = counted.report, counted.arithmetic
    transferred = report.transferred_params * number_bytes
    layers = [dataclasses.asdict(layer) for layer in report.layers]
    return {
        "model": counted.model,
        "method": report.method,
        "rule": report.rule or None,
        "budget": counted.case.value if counted.case.kind == "budget" else None,
        "target": counted.target,
        "original_params": report.original_params,
        "params": report.params,
        "trainable_params": report.trainable_params,
        "transferred_params": report.transferred_params,
        "final_params": report.final_params,
        "ratio": report.ratio,
        "dtype": dtype,
        "bytes": transferred,
        "max_rank": max((layer.max_rank for layer in report.layers), default=None),
        "flops": None if arithmetic is None else {**dataclasses.asdict(arithmetic), "batch_size": batch_size},
        "layers": layers,
        "left": [dataclasses.asdict(entry) for entry in report.left],
        "communication": None
        if traffic is None
        else {
            **dataclasses.asdict(traffic),
            "bytes_per_round": traffic.bytes_per_round(transferred),
            "total_bytes": traffic.rounds * traffic.bytes_per_round(transferred),
        },
    }


_COLUMNS = ("model", "method", "rule", "name", "type", "shape", "rank", "max_rank", "original_params", "params")


def write_csv(results: Sequence[Counted], path: Path) -> None:
    """A row for each layer that a method changes, of every case.

    Raises:
        LowrankError: the file cannot be written.
    """
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            for counted in results:
                for layer in counted.report.layers:
                    values: dict[str, Any] = {
                        **dataclasses.asdict(layer),
                        "model": counted.model,
                        "method": counted.report.method,
                        "rule": counted.report.rule,
                        "shape": "x".join(map(str, layer.shape)),
                    }
                    writer.writerow([values[column] for column in _COLUMNS])
    except OSError as error:
        raise LowrankError(f"--csv cannot write to {path}: {error.strerror}; give another file") from None
