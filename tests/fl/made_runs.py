"""Folders of runs with numbers that a test chooses, as `lowrank fl run` writes them."""

import dataclasses
import json
from pathlib import Path

import yaml

from lowrank_fl.load import load_config
from lowrank_fl.results import RoundRow, RunSummary


def write_run(
    folder: Path,
    preset: str = "mnist",
    *overrides: str,
    seed: int = 0,
    accuracies: tuple[float, ...] = (0.5, 0.9),
    worst: float | None = None,
    client_bytes: int = 1_000_000,
    params: tuple[int, int, int] = (100, 100, 1000),
    seconds: float = 10.0,
    gaps: tuple[tuple[float, float | None], ...] | None = None,
    whole: bool = True,
    interrupted: bool = False,
) -> Path:
    """A run that finished a round for each accuracy; every client of a round moved `client_bytes`, half of them up.

    params: the model's, the transferred and the original's.
    gaps: of each round the aggregation gap, and what a refit leaves of it.
    whole: the configuration asks for as many rounds as there are accuracies.
    interrupted: without a summary, as a killed run leaves its folder.
    """
    rounds = [f"rounds={len(accuracies)}"] if whole else []
    config = load_config(preset, [*rounds, *overrides], seed=seed)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude={"sweep"})))
    clients = config.federation.clients_per_round
    up = down = client_bytes * clients // 2
    rows = [
        RoundRow(n, value, 1.0, 1.0, up, down, up + down, seconds, list(range(clients)), worst_accuracy=worst)
        for n, value in enumerate(accuracies, 1)
    ]
    if gaps is not None:
        rows = [
            dataclasses.replace(row, aggregation_gap=gap, refit_residual=left)
            for row, (gap, left) in zip(rows, gaps, strict=True)
        ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))
    if not interrupted:
        summary = RunSummary(
            name=config.name,
            run_dir=str(folder),
            method=config.model.method,
            seed=seed,
            rounds=len(rows),
            accuracy=accuracies[-1],
            loss=1.0,
            params=params[0],
            transferred_params=params[1],
            original_params=params[2],
            uplink_bytes=up * len(rows),
            downlink_bytes=down * len(rows),
            total_bytes=(up + down) * len(rows),
            seconds=seconds * len(rows),
        )
        (folder / "summary.json").write_text(json.dumps(dataclasses.asdict(summary)))
    return folder
