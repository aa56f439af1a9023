"""Which layers of a model an adapter goes to, and with what rank: PEFT's rules, without its silences."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowrank_core.adapters.config import AdapterConfig
from lowrank_core.adapters.geometry import Geometry
from lowrank_core.adapters.patterns import by_ending, compiled
from lowrank_core.adapters.wrapper import original_modules
from lowrank_core.errors import UsageError, quoted, shortened

T = TypeVar("T")

ADAPTABLE = "Linear, Conv1d, Conv2d, Conv3d, Embedding or transformers' Conv1D"


@dataclass(frozen=True)
class Target:
    """A layer that an adapter goes to; `name` and `module` are those of the model without adapters."""

    name: str
    module: nn.Module
    geometry: Geometry
    rank: int
    alpha: float


def find_targets(model: nn.Module, config: AdapterConfig) -> list[Target]:
    """The layers that `config` means, in the order of the model's modules. Changes nothing; meta weights will do.

    The rules are those of PEFT 0.21 (`check_target_module_exists`, `get_pattern_key`): what `exclude_modules` or
    `modules_to_save` names is out; a string is a regular expression for whole names, or `"all-linear"`; a list holds
    whole names, or endings after a dot, which `layers_to_transform` narrows. A module used under several names goes by
    the first of them. `"all-linear"` leaves out the output embedding of a transformers model, or its classification
    head where `other_fields["task_type"]` is `"SEQ_CLS"`.

    Raises:
        UsageError: a pattern of any field that matches no module (with the nearest names) or is no regular expression,
            everything that matched is excluded, a matched module that cannot be adapted, a model that is one layer.
    """
    modules = dict(original_modules(model))
    if Geometry.of(modules[""]) is not None:
        kind = type(modules[""]).__name__
        raise UsageError(f"the model is itself a {kind}, which cannot be replaced in place; put it in an nn.Sequential")
    names = [name for name in modules if name]
    matched = _matched(model, modules, config)
    excluded = set(_named(names, config.exclude_modules, "exclude_modules"))
    saved = saved_names(model, config)
    out = excluded.union(name for name in names if any(name == s or name.startswith(f"{s}.") for s in saved))
    chosen = [name for name in matched if name not in out]
    if not chosen:
        reason = "exclude_modules or modules_to_save names" if matched else "layers_to_transform leaves out"
        raise UsageError(f"no layer is left to adapt: {reason} everything that target_modules matches; narrow it")
    ranks = by_pattern(chosen, config.rank_pattern, "rank_pattern")
    alphas = by_pattern(chosen, config.alpha_pattern, "alpha_pattern")
    return [
        Target(
            name,
            modules[name],
            _geometry(name, modules, config),
            ranks.get(name, config.rank),
            alphas.get(name, config.alpha),
        )
        for name in chosen
    ]


def saved_names(model: nn.Module, config: AdapterConfig) -> list[str]:
    """The modules that `modules_to_save` means: whole names, or endings after a dot; those inside another left out.

    Raises:
        UsageError: an entry that matches no module.
    """
    found = _named([name for name, _ in original_modules(model) if name], config.modules_to_save, "modules_to_save")
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def _matched(model: nn.Module, modules: Mapping[str, nn.Module], config: AdapterConfig) -> list[str]:
    """The names that `target_modules` and `layers_to_transform` mean, before anything is excluded."""
    wanted = config.target_modules
    names = [name for name in modules if name]
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        head = _head(model, config)
        linear = [
            name
            for name in names
            if _is_linear(modules[name])
            and modules[name] not in head
            # nn.MultiheadAttention reads this layer's weight and never calls it.
            and not isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)
        ]
        if not linear:
            raise UsageError('target_modules "all-linear" matches no module: the model has no Linear besides its head')
        return linear
    if not wanted:
        raise UsageError(f'target_modules names no module; list some, such as {_examples(names)}, or say "all-linear"')
    matched = _named(names, wanted, "target_modules")
    return matched if isinstance(wanted, str) else _in_layers(matched, wanted, config)


def _named(names: Sequence[str], patterns: Sequence[str] | str, field: str) -> list[str]:
    """The names that are in a list, whole or as an ending, or that a regular expression matches.

    Raises:
        UsageError: a pattern matches none of them, or what `compiled` raises.
    """
    if isinstance(patterns, str):
        expression = compiled(field, {patterns: patterns}, names, "fullmatch")[patterns]
        found = [name for name in names if patterns and expression.fullmatch(name)]
        unmatched = [patterns] if patterns and not found else []
    else:
        wanted = set(patterns)
        endings = {name: wanted.intersection(_endings(name)) for name in names}
        found = [name for name in names if endings[name]]
        used = set[str]().union(*endings.values())
        unmatched = [p for p in patterns if p not in used]
    if unmatched:
        raise UsageError(f"{field} {shortened(repr(unmatched[0]))} matches no module; {_nearest(unmatched[0], names)}")
    return found


def _endings(name: str) -> list[str]:
    """`a.b.c`, `b.c` and `c`."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _nearest(pattern: str, names: Sequence[str]) -> str:
    """What to say of a pattern that matches nothing: the nearest names, of as many parts as the pattern has."""
    plain = re.sub(r"[^\w.]|\.(?=[*+?])", "", pattern.replace("\\.", ".")).strip(".")
    parts = plain.count(".") + 1
    shortened = {".".join(name.split(".")[-parts:]): None for name in names}
    near = get_close_matches(plain, shortened, n=3, cutoff=0.4) or get_close_matches(plain, names, n=3, cutoff=0.3)
    return f"the nearest names are {quoted(near)}" if near else f"the model has, for instance, {_examples(names)}"


def _examples(names: Sequence[str]) -> str:
    return quoted(
        list(dict.fromkeys(name.rpartition(".")[2] for name in names if not name[-1].isdigit()))[:3] or names[:3]
    )


def _in_layers(names: Sequence[str], listed: Sequence[str], config: AdapterConfig) -> list[str]:
    """The names that are in the list as a whole, or whose layer number is one of `layers_to_transform`."""
    wanted = config.layers_to_transform
    if wanted is None or (not isinstance(wanted, int) and not wanted):
        return list(names)
    numbers = (wanted,) if isinstance(wanted, int) else wanted
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else list(config.layers_pattern or ())
    written = {p: rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns if p}
    # Without a pattern the first number inside the name counts, so that an expert's number does not.
    expressions = list(compiled("layers_pattern", written, names).values()) or [_FIRST_NUMBER]

    def has_number(name: str) -> bool:
        found = next((match for e in expressions if (match := e.match(name))), None)
        # The last group is ours, whatever groups a pattern has.
        return found is not None and int(found[found.re.groups]) in numbers

    return [name for name in names if name in listed or has_number(name)]


_FIRST_NUMBER = re.compile(r".*?\.[^.]*\.(\d+)\.")


def _head(model: nn.Module, config: AdapterConfig) -> set[nn.Module]:
    """What "all-linear" leaves out of a transformers model."""
    # A model of transformers has imported this already; no other needs it.
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return set()
    head = cast(Any, model).get_output_embeddings()
    if head is None and config.other_fields.get("task_type") == "SEQ_CLS":
        head = getattr(model, "score", None) or getattr(model, "classifier", None)
    return set() if head is None else {module for _, module in original_modules(cast(nn.Module, head))}


def _is_linear(module: nn.Module) -> bool:
    geometry = Geometry.of(module)
    return geometry is not None and geometry.kind == "linear"


def _geometry(name: str, modules: Mapping[str, nn.Module], config: AdapterConfig) -> Geometry:
    """The geometry of a matched layer.

    Raises:
        UsageError: the module cannot be adapted, with the reason.
    """
    module = modules[name]
    kind = type(module).__name__
    leave = "leave it out with exclude_modules"
    geometry = Geometry.of(module)
    if geometry is None:
        if getattr(module, "padding_mode", "zeros") != "zeros":
            raise UsageError(f"{name} pads by {module.padding_mode!r}, and adapters cover zero padding alone; {leave}")
        if hasattr(module, "base_layer") and type(module).__module__.startswith("peft."):
            raise UsageError(f"{name} carries an adapter of PEFT already; use patch_peft, or take that adapter off")
        if hasattr(module, "qweight") or hasattr(module, "W_q") or "quantized" in type(module).__module__:
            raise UsageError(
                f"{name} is a quantized layer ({kind}), which is not supported; load the model unquantized"
            )
        raise UsageError(f"{name} is of type {kind}, and adapters go to {ADAPTABLE} layers alone; {leave}")
    weight = module.weight
    assert isinstance(weight, Tensor)
    if is_lazy(weight):
        raise UsageError(f"{name} has no weight yet ({kind}); run the model once before adapting it")
    if not weight.is_floating_point() or type(weight.data).__module__.startswith("torchao"):
        raise UsageError(f"{name} is a quantized layer ({kind}), which is not supported; load the model unquantized")
    if geometry.kind == "embedding" and config.method != "lora":
        raise UsageError(f"{name} is an Embedding, to which only LoRA goes, got {config.method}; {leave}")
    parent = modules[name.rpartition(".")[0]]
    if isinstance(parent, nn.MultiheadAttention):
        raise UsageError(f"{name} is read by nn.MultiheadAttention without being called, so no adapter acts; {leave}")
    return geometry


def by_pattern(names: Sequence[str], patterns: Mapping[str, T], field: str) -> dict[str, T]:
    """The values of `rank_pattern` or `alpha_pattern` by layer; the first key that matches counts.

    Raises:
        UsageError: a key matches no layer, or what `compiled` raises.
    """
    values, unmatched = by_ending(names, patterns, field)
    if unmatched:
        found = shortened(repr(unmatched[0]))
        raise UsageError(f"{field} {found} matches no adapted layer; {_nearest(unmatched[0], names)}")
    return values
