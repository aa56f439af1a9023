"""A run's last finished round: all it takes, with the configuration, to go on as if nothing had happened."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import nn

from lowrank_core import LowrankError
from lowrank_core.errors import shortened
from lowrank_fl.config import RunConfig
from lowrank_fl.folder import write_whole
from lowrank_fl.state import state_of, trained_state

_FILE = Path("checkpoint", "state.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """The model after `round`, and what strategy and codecs carry over to the next.

    Everything random in a round follows from (seed, round, client), so there is no generator to save. What clients
    keep, they keep themselves, by round; `wire` says which round's each of them goes on from.
    """

    round: int
    model: Mapping[str, np.ndarray]
    strategy: Mapping[str, np.ndarray]
    wire: Mapping[str, np.ndarray]
    base: str = ""
    """`base_digest` of the model."""
    ranks: Mapping[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    """What AdaLoRA's allocation carries over."""

    def state_round(self, client: int) -> int:
        """The round that left what this client goes on from, the last whose reply was used; 0 if there is none."""
        return dict(self.wire["accepted"].tolist()).get(client, 0)


def save_checkpoint(folder: Path, config: RunConfig, checkpoint: Checkpoint) -> None:
    """Replace the folder's checkpoint by this one, whole or not at all."""
    tensors = {f"model/{name}": value for name, value in checkpoint.model.items()}
    tensors |= {f"strategy/{name}": value for name, value in checkpoint.strategy.items()}
    tensors |= {f"wire/{name}": value for name, value in checkpoint.wire.items()}
    tensors |= {f"ranks/{name}": value for name, value in checkpoint.ranks.items()}
    contiguous = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    path = folder / _FILE
    path.parent.mkdir(exist_ok=True)
    write_whole(
        path, save(contiguous, {"round": str(checkpoint.round), "config": _digest(config), "base": checkpoint.base})
    )


def load_checkpoint(folder: Path, config: RunConfig) -> Checkpoint | None:
    """The folder's checkpoint; None before the end of the first round.

    Raises:
        LowrankError: it is damaged, or of a run with another configuration.
    """
    path = folder / _FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, "numpy") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise LowrankError(
            f"{path} is damaged ({shortened(str(error))}); remove {path.parent} to start this run again from its first "
            "round"
        ) from None
    if about.get("config") != _digest(config):
        raise LowrankError(
            f"{path} was left by a run with another configuration than {folder / 'config.yaml'} has now; "
            "put that file back as it was, or start a new run"
        )
    parts = {
        part: {name.removeprefix(f"{part}/"): value for name, value in tensors.items() if name.startswith(f"{part}/")}
        for part in ("model", "strategy", "wire", "ranks")
    }
    round_number, accepted = about.get("round", ""), parts["wire"].get("accepted")
    if not re.fullmatch(r"[1-9][0-9]{0,17}", round_number) or accepted is None or accepted.shape[1:] != (2,):
        raise LowrankError(
            f"{path} is damaged (its round is {shortened(repr(round_number))}); remove {path.parent} to start this run "
            "again from its first round"
        )
    return Checkpoint(int(round_number), **parts, base=about.get("base", ""))


def base_digest(model: nn.Module) -> str:
    """Of the weights that nobody trains, which are in no checkpoint; "" where there are none."""
    trained, digest = trained_state(model), hashlib.sha256()
    frozen = {name: tensor for name, tensor in state_of(model).items() if name not in trained}
    for name, tensor in frozen.items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest() if frozen else ""


def _digest(config: RunConfig) -> str:
    """Of everything that changes a round; of the engine threads and execution do, and more rounds may be asked for.

    Values that are the default are left out, so that a key which a later version adds changes nothing.
    """
    others: dict[str, Any] = dict.fromkeys(("name", "sweep", "rounds", "engine"), True)
    excluded = {**others, "federation": {"tolerated_failures"}}
    tree = config.model_dump(mode="json", exclude=excluded, exclude_defaults=True)
    tree["threads"] = config.engine.threads
    if config.engine.execution != "sequential":
        tree["execution"] = config.engine.execution
    if config.adapter.method == "adalora":
        tree["rounds"] = config.rounds  # which its schedule is in shares of
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
