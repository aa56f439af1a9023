"""What layers and PEFT's configuration are told of their ranks."""

# torch leaves the types of modules it yields partly open.
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

from collections.abc import Sequence
from typing import Any

from torch import nn

from lowrank_core.adaptive.groups import Group


def note_ranks(model: nn.Module, groups: Sequence[Group]) -> None:
    """Write every layer's boolean pattern where saving looks for it.

    Our modules get an attribute `rank_pattern`, PEFT's configuration of the adapter its field of that name. PEFT cuts
    whole tensors by the pattern when it saves, and leaves alone those that are cut already.
    """
    patterns: dict[str, dict[str, list[bool]]] = {}
    for group in groups:
        kept = group.sides[0].kept()
        if isinstance(group.home, nn.ParameterDict):
            adapter = group.sides[0].value.leaf
            layer = group.name.removesuffix(f".{adapter}").removeprefix("base_model.model.")
            patterns.setdefault(adapter, {})[f"{layer}.lora_E.{adapter}"] = kept
        else:
            group.home.rank_pattern = kept  # pyright: ignore[reportArgumentType] - a plain attribute, no submodule
            note_rank(group)
    for module in model.modules():
        configs: dict[str, Any] = vars(module).get("peft_config") or {}
        for adapter, pattern in patterns.items():
            if adapter in configs and hasattr(configs[adapter], "orth_reg_weight"):
                configs[adapter].rank_pattern = pattern
    note_peft_lohas(model, groups)


def note_peft_lohas(model: nn.Module, groups: Sequence[Group]) -> None:
    """Give PEFT's configuration the ranks that its LoHa layers have left, and the alphas that keep their scales."""
    layers: dict[Any, Any] = {vars(module)["_modules"].get("hada_w1_b"): module for module in model.modules()}
    configs: list[tuple[str, Any]] = [
        config for module in model.modules() for config in (vars(module).get("peft_config") or {}).items()
    ]
    for group in groups:
        if not isinstance(group.home, nn.ParameterDict) or group.home not in layers:
            continue
        value, layer = group.sides[0].value, layers[group.home]
        adapter, rank, initial = value.leaf, value.rank, layer.r[value.leaf]
        name = "^" + group.name.removesuffix(f".{adapter}").rpartition("base_model.model.")[2]
        for config in [config for owner, config in configs if owner == adapter and rank != initial]:
            # The first key that matches counts.
            config.rank_pattern = {name: rank} | config.rank_pattern | {name: rank}
            alpha = layer.alpha[adapter] * rank / initial
            config.alpha_pattern = {name: alpha} | config.alpha_pattern | {name: alpha}


def note_rank(group: Group) -> None:
    """Tell a factorized layer the rank that its factors have; an adapter's `rank` is what its scale refers to."""
    if "values" in group.sides[0].factors:
        group.home.rank = group.sides[0].rank  # pyright: ignore[reportArgumentType]


def rank_pattern(model: nn.Module) -> dict[str, list[bool]]:
    """For each of our adapters in the model whose rank has settled: which of its first directions it keeps.

    The tensors hold just those, in this order, where they were cut; all, with zero values, where they were not.
    """
    found = ((name, vars(module).get("rank_pattern")) for name, module in model.named_modules())
    return {name: pattern for name, pattern in found if pattern is not None}
