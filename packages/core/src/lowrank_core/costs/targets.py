"""The layers that a word such as `attention` means in a model."""

# torch leaves the types of modules it yields partly open.
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false, reportUnknownMemberType=false

import re
from difflib import get_close_matches

from torch import nn

from lowrank_core.adapters.geometry import Geometry
from lowrank_core.candidates import find_candidates
from lowrank_core.errors import UsageError

# What diffusers, transformers' families (Llama, BERT, GPT-2, GPT-NeoX, T5, DistilBERT, CLIP) and timm call them.
_ATTENTION = (
    r"to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|[qkvo]_proj|out_proj|qkv_proj|query|key|value|"
    r"attention\.output\.dense|attention\.dense|query_key_value|c_attn|attn\.c_proj|attn\.proj|qkv|[qkv]_lin|out_lin|"
    r"(Self|EncDec)Attention\.[qkvo]"
)
_MLP = (
    r"ff\.net\.0\.proj|ff\.net\.2|fc1|fc2|gate_proj|up_proj|down_proj|gate_up_proj|c_fc|mlp\.c_proj|"
    r"intermediate\.dense|(?<!attention\.)output\.dense|dense_h_to_4h|dense_4h_to_h|lin1|lin2|wi(_[01])?|wo"
)
_PATTERNS = {"attention": _ATTENTION, "attention+mlp": f"{_ATTENTION}|{_MLP}"}

TARGETS = ("attention", "attention+mlp", "all-linear", "all-conv", "all")
"""What `named_targets` understands; `all` is every linear layer and convolution."""


def named_targets(model: nn.Module, target: str) -> list[str]:
    """The names of the linear layers and convolutions that `target`, one of `TARGETS`, means.

    Raises:
        UsageError: there is none.
    """
    names: list[str] = []
    for name, module in model.named_modules():
        geometry = Geometry.of(module)
        if not name or geometry is None or geometry.kind == "embedding":
            continue
        # nn.MultiheadAttention reads this layer's weight without calling it, so no adapter would act.
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
            continue
        pattern = _PATTERNS.get(target)
        kind = target.removeprefix("all-") in (geometry.kind, "all")
        if re.fullmatch(rf"(.*\.)?({pattern})", name) if pattern else kind:
            names.append(name)
    if not names:
        raise UsageError(
            f"the target {target!r} matches no layer of this model; "
            f"choose another of {', '.join(TARGETS)}, or give a regular expression for layer names"
        )
    return names


def default_target(model: nn.Module) -> str:
    """`attention` where a model has such layers, otherwise `all`."""
    try:
        named_targets(model, "attention")
    except UsageError:
        return "all"
    return "attention"


def matching_candidates(model: nn.Module, target: str) -> list[str]:
    """The weights of which `factorize` can make factors whose whole name matches a regular expression.

    Raises:
        UsageError: none does, with the nearest names, or `target` is no regular expression.
    """
    names = [candidate.name for candidate in find_candidates(model)[0]]
    try:
        found = [name for name in names if re.fullmatch(target, name)]
    except re.error as error:
        raise UsageError(f"the target {target!r} is not a regular expression: {error}; mend it") from None
    if not found:
        nearest = get_close_matches(target, names, n=3, cutoff=0.3) or names[:3]
        raise UsageError(f"the target {target!r} matches no layer; the nearest names are {', '.join(nearest)}")
    return found
