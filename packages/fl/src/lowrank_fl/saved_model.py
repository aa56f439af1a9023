"""The model of a finished run: read from its folder, and taken as the start of another."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, FiniteFloat, PositiveInt, ValidationError
from torch import Tensor, nn

from lowrank_core.adapters.inject import remove
from lowrank_core.adapters.merge import merge
from lowrank_core.errors import LowrankError, shortened
from lowrank_core.factorizations import Svd
from lowrank_core.files.tensors import read_shapes, read_tensors
from lowrank_core.layers import FactorizedWeight
from lowrank_core.parsing import parse_json, record_of
from lowrank_fl.config import AdapterConfig, ModelConfig
from lowrank_fl.flops import Undrawn
from lowrank_fl.models.adapted import put_adapter
from lowrank_fl.models.build import build_model, head_of
from lowrank_fl.ranks.layers import fit
from lowrank_fl.state import state_of

_LARGER = 8
"""Many times what is in its file may a network be, because AdaLoRA's ranks have fallen; more is never allocated."""


def read_description(folder: Path) -> dict[str, Any]:
    """model.json of a run.

    Raises:
        LowrankError: the folder holds no finished run, or its model.json is damaged.
    """
    path = folder / "model.json"
    if not path.is_file():
        runs = sorted(child.name for child in folder.glob("*/") if (child / "model.json").is_file())
        hint = f"name one of its runs, such as {folder / runs[0]}" if runs else "finish it with lowrank fl run --resume"
        raise LowrankError(f"{folder} has no model.json, which a finished run has; {hint}")
    try:
        description = parse_json(path.read_bytes())
    except ValueError as error:
        raise damaged(folder, f"model.json is not JSON: {shortened(str(error))}") from None
    keys = ("model", "input_shape", "classes", "mean", "std", "white")
    missing = [key for key in keys if not isinstance(description, dict) or key not in description]
    if missing:
        raise damaged(folder, f"model.json has no {missing[0]}")
    try:
        record_of(_Inputs, description)
    except ValueError as error:
        raise damaged(folder, f"model.json has {shortened(str(error))}") from None
    return description


@dataclass(frozen=True)
class _Inputs:
    """What model.json says of the model's inputs and answers."""

    input_shape: Annotated[list[PositiveInt], Field(min_length=1, max_length=3)]
    classes: Annotated[list[str], Field(min_length=1)]
    mean: list[FiniteFloat]
    std: list[FiniteFloat]
    white: PositiveInt


def network_of(folder: Path, description: Mapping[str, Any]) -> nn.Module:
    """The network that `model.json` describes, an adapter with it, with any weights.

    Raises:
        LowrankError: it describes none, or one far larger than the weights beside it.
    """
    try:
        config = ModelConfig.model_validate(description["model"])
        adapter = AdapterConfig.model_validate(description.get("adapter") or {})
    except ValidationError as error:
        fault = error.errors()[0]
        reason = f"{'.'.join(map(str, fault['loc']))} {fault['msg'].removeprefix('Value error, ')}".strip()
        raise damaged(folder, shortened(reason)) from None
    # Their weights are in the run's own file.
    config = config.model_copy(update={"pretrained": False})
    shape, classes = tuple(description["input_shape"]), len(description["classes"])

    def build() -> nn.Module:
        model, _ = build_model(config, shape, classes, seed=0)
        if adapter.method is not None:
            put_adapter(model, config.name, adapter, seed=0)
        return model

    held = sum(map(math.prod, read_shapes(folder / "model.safetensors").values()))
    try:
        with torch.device("meta"), Undrawn():
            count = sum(tensor.numel() for tensor in state_of(build()).values())
    # torch's own errors, of sizes that no tensor can have.
    except (RuntimeError, OverflowError, TypeError, ValueError) as error:
        raise damaged(folder, f"model.json describes no network: {shortened(str(error))}") from None
    if count > _LARGER * held:
        raise damaged(folder, f"model.json describes {count:,} numbers, and model.safetensors holds {held:,}")
    return build()


def fill(folder: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the model all the values of `state_of`; raises LowrankError where names or shapes differ, ranks aside."""
    fit(model, tensors)
    if wrong := _first_difference(_shapes(state_of(model)), _shapes(tensors)):
        raise damaged(folder, f"{wrong} is not as model.json has it")
    model.load_state_dict(tensors, strict=False)


def start_from(model: nn.Module, network: str, folder: Path) -> None:
    """Give a model that has no adapter the weights of the run in `folder`, which is `model.start`.

    The last layer keeps the values it has where that of the run has other names or shapes, as with other classes. An
    adapter of that run is merged into its layers first. A weight that the run had whole becomes the nearest factors of
    method `svd`, as after Pufferfish's warm-up (Wang et al., 2021, Algorithm 1).

    Raises:
        LowrankError: the folder holds no finished run, or any other weight differs in name or shape.
    """
    description = read_description(folder)
    source = network_of(folder, description)
    fill(folder, source, read_tensors(folder / "model.safetensors")[0])
    if description.get("adapter"):
        merge(source)
        remove(source, keep_merged=True)
    held = state_of(model)
    given_tensors = _split_by_svd(state_of(source), model)
    head = f"{head_of(network, model)}."
    given, wanted = _shapes(given_tensors), _shapes(held)
    if {n: s for n, s in given.items() if n.startswith(head)} != {
        n: s for n, s in wanted.items() if n.startswith(head)
    }:
        given, wanted = ({n: s for n, s in shapes.items() if not n.startswith(head)} for shapes in (given, wanted))
    if wrong := _first_difference(wanted, given):
        raise LowrankError(
            f"model.start is {folder}, and {wrong} is {_said(given.get(wrong))} there and {_said(wanted.get(wrong))} "
            f"in this run's network; set the keys of model as {folder / 'config.yaml'} has them, or start from "
            "another run"
        )
    with torch.no_grad():
        for name, tensor in given_tensors.items():
            if name in given:
                held[name].copy_(tensor)


def _split_by_svd(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors with factors in place of the whole weights that are factors of an SVD in `model`.

    The roots of the singular values go to both sides, so that steps of one length suit both; λ is 1.
    """
    found = dict(tensors)
    for name, module in model.named_modules():
        if not isinstance(module, FactorizedWeight) or not isinstance(module.factorization, Svd) or name not in found:
            continue
        left, values, right = torch.linalg.svd(found.pop(name).flatten(1).double(), full_matrices=False)
        roots = values[: module.rank].sqrt()
        factors = {
            "left": left[:, : module.rank] * roots,
            "values": torch.ones_like(roots),
            "right": roots[:, None] * right[: module.rank],
        }
        found |= {f"{name}.{factor}": tensor for factor, tensor in factors.items()}
    return found


def damaged(folder: Path, reason: str) -> LowrankError:
    return LowrankError(f"the model in {folder} cannot be used ({reason}); copy the run's folder again")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _first_difference(wanted: Mapping[str, object], held: Mapping[str, object]) -> str | None:
    return next((name for name in sorted(wanted.keys() | held.keys()) if wanted.get(name) != held.get(name)), None)


def _said(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape)) or "a number"
