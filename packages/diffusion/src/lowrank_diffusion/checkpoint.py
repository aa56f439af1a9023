"""A run's finished steps: all it takes, with the configuration, to go on as if nothing had happened.

A checkpoint is one safetensors file: the adapters' factors, their running average and the optimizer's tensors under
their names, and in the file's metadata, as JSON, everything of the optimizer that is no tensor. Everything random in a
step follows from (seed, step, example), so there is no generator to keep, and the learning rate follows from the step.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lowrank_core.errors import LowrankError, shortened
from lowrank_core.files.check import some
from lowrank_core.files.tensors import read_tensors, write_tensors
from lowrank_core.parsing import parse_json, record_of
from lowrank_diffusion.config import DiffusionConfig
from lowrank_diffusion.published import published

_FOLDER = "checkpoint"
_TENSOR = "$tensor"
"""Marks a tensor's place in the JSON."""


@dataclass(frozen=True)
class Checkpoint:
    """The state after `step` optimizer steps."""

    step: int
    adapters: Mapping[str, Tensor]
    """As `Adapters.state` names them."""
    optimizer: Mapping[str, Any]
    """Its state dict, with parameters under their names in place of numbers."""
    averages: Mapping[str, Tensor]
    """The running average of the parameters, by their names; empty where there is none."""


def run_digest(config: DiffusionConfig, pictures: str, processes: int) -> str:
    """Of everything that changes a run's numbers.

    Args:
        config: of the run.
        pictures: `Material.digest`.
        processes: of all machines together; with batch and accumulation they make the global batch.
    """
    tree = published(config)
    for section in ("name", "sample", "track", "hub"):
        del tree[section]
    for key in ("checkpoint_every", "keep_checkpoints", "loss_limit", "device", "processes"):
        del tree["train"][key]
    # A run may go on where the same pictures lie elsewhere.
    del tree["data"]["path"], tree["prior"]["path"], tree["cache"]["folder"]
    described = json.dumps([tree, pictures, processes], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def save_checkpoint(run: Path, digest: str, checkpoint: Checkpoint, keep: int) -> None:
    """Write a checkpoint, whole or not at all, and then remove all but the `keep` latest.

    Raises:
        LowrankError: the disk is full or cannot be written to; older checkpoints are untouched.
    """
    tensors = {f"adapter/{name}": tensor for name, tensor in checkpoint.adapters.items()}
    tensors |= {f"average/{name}": tensor for name, tensor in checkpoint.averages.items()}
    described = _without_tensors(checkpoint.optimizer, "optimizer", tensors)
    about = {"step": str(checkpoint.step), "run": digest, "optimizer": json.dumps(described)}
    write_tensors(run / _FOLDER / f"step-{checkpoint.step:08}.safetensors", tensors, about)
    for path in checkpoints(run)[:-keep]:
        path.unlink()


def checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints, the latest one last."""
    return sorted((run / _FOLDER).glob("step-*.safetensors"))


def load_checkpoint(run: Path, digest: str | None) -> Checkpoint | None:
    """The latest checkpoint; None where there is none.

    Args:
        run: the run's folder.
        digest: of the run that goes on; None takes any.

    Raises:
        LowrankError: it is damaged, or of a run with another configuration or other pictures.
    """
    found = checkpoints(run)
    if not found:
        return None
    path = found[-1]
    try:
        tensors, about = read_tensors(path)
        step, optimizer = int(about["step"]), _with_tensors(parse_json(about["optimizer"]), tensors)
        record_of(_OptimizerState, optimizer)
    except (LowrankError, LookupError, TypeError, ValueError) as error:
        raise LowrankError(
            f"the checkpoint {path} is damaged ({shortened(str(error))}); remove it to go on from the one before, "
            "or from the start"
        ) from None
    if digest is not None and about.get("run") != digest:
        raise LowrankError(
            f"the checkpoint {path} was left by a run with another configuration, other pictures or another number of "
            f"processes than {run / 'config.yaml'} means now; put those back, or start a new run"
        )
    return Checkpoint(step, _below("adapter", tensors), optimizer, _below("average", tensors))


def _below(folder: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{folder}/"): t for name, t in tensors.items() if name.startswith(f"{folder}/")}


@dataclass(frozen=True)
class _Group:
    params: list[str]


@dataclass(frozen=True)
class _OptimizerState:
    """What of `Checkpoint.optimizer` is the same in every optimizer."""

    state: dict[str, dict[str, Any]]
    param_groups: list[_Group]


def named_state(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """An optimizer's state dict with its parameters' names where torch has their numbers."""
    return {
        **state,
        "state": {names[number]: values for number, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }


def numbered_state(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """What `named_state` made of it, turned back.

    Raises:
        LowrankError: it is of parameters that are not among `names`.
    """
    numbers = {name: number for number, name in enumerate(names)}
    held = [*state["state"], *(name for group in state["param_groups"] for name in group["params"])]
    if foreign := [name for name in held if name not in numbers]:
        raise LowrankError(
            f"the checkpoint has the optimizer's state of {some(foreign, 3)}, which this run does not train; remove "
            "the checkpoint to go on from the one before, or from the start"
        )
    return {
        **state,
        "state": {numbers[name]: values for name, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]
        ],
    }


def _without_tensors(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The tree as JSON; its tensors are put into `tensors` under their paths."""
    if isinstance(tree, Tensor):
        tensors[path] = tree
        return {_TENSOR: path}
    if isinstance(tree, Mapping):
        assert all(isinstance(key, str) for key in tree), "JSON would make text of other keys"
        return {key: _without_tensors(value, f"{path}/{key}", tensors) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_without_tensors(value, f"{path}/{number}", tensors) for number, value in enumerate(tree)]
    return tree


def _with_tensors(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, dict):
        if tree.keys() == {_TENSOR}:
            return tensors[tree[_TENSOR]]
        return {key: _with_tensors(value, tensors) for key, value in tree.items()}
    return [_with_tensors(value, tensors) for value in tree] if isinstance(tree, list) else tree
