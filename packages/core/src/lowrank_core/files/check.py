"""What factors a method has, and whether a file's fit together, as far as can be said without the layer."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lowrank_core.errors import LowrankError, shortened

# A letter is a length that every factor of the module must share; `*` is the kernel, whatever it is.
_LORA = {"lora_A": "r i *", "lora_B": "o r *"}
_GROUPED = {"lora_A": "r i *", "lora_B": "o g *"}
"""PEFT's layout for grouped convolutions (see `grouped.py`)."""
_HADA = {"hada_w1_a": "o r", "hada_w1_b": "r i", "hada_w2_a": "o r", "hada_w2_b": "r i"}
_HADA_TUCKER = {
    "hada_w1_a": "r o",
    "hada_w1_b": "r i",
    "hada_w2_a": "r o",
    "hada_w2_b": "r i",
    "hada_t1": "r r *",
    "hada_t2": "r r *",
}
_W1 = ({"lokr_w1": "a c"}, {"lokr_w1_a": "a s", "lokr_w1_b": "s c"})
_W2 = (
    {"lokr_w2": "b d *"},
    {"lokr_w2_a": "b r", "lokr_w2_b": "r d"},
    {"lokr_w2_a": "r b", "lokr_w2_b": "r d", "lokr_t2": "r r *"},
)
_SETS: dict[str, list[dict[str, str]]] = {
    "lora": [_LORA, {**_LORA, "lora_mid": "r r *"}, {"lora_embedding_A": "r i", "lora_embedding_B": "o r"}],
    "loha": [_HADA, _HADA_TUCKER],
    "lokr": [{**first, **second} for first in _W1 for second in _W2],
    "adalora": [{"lora_A": "r i", "lora_B": "o r", "lora_E": "r 1"}],
}

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

FACTOR_NAMES = {method: {name for names in sets for name in names} for method, sets in _SETS.items()}
"""Every name that a factor of the method can have."""


def check_factors(method: str, name: str, factors: Mapping[str, Tensor]) -> int:
    """Check one module's factors against each other; its rank, or 0 where a file does not say (a LoKr of whole sides).

    Raises:
        LowrankError: factors are missing, of a wrong shape, of rank 0, of a dtype that is not computed with, or not
            finite.
    """
    axes = next((names for names in _SETS[method] if names.keys() == factors.keys()), None)
    if axes is None:
        raise LowrankError(
            f"{name} holds {_list(factors)}, which is no whole {method} adapter; it takes {_choices(method)}"
        )
    if axes is _LORA and _is_grouped(factors):
        axes = _GROUPED
    lengths: dict[str, tuple[int, str]] = {"1": (1, "")}
    for factor, letters in axes.items():
        shape = factors[factor].shape
        wanted = letters.replace(" *", "").split()
        if len(shape) < len(wanted) or (len(shape) > len(wanted) and not letters.endswith("*")):
            raise LowrankError(f"{name} has {factor} of shape {tuple(shape)}, expected {len(wanted)} dimensions")
        for letter, length in zip(wanted, shape, strict=False):
            known, where = lengths.setdefault(letter, (length, factor))
            if known != length:
                raise LowrankError(
                    f"{name} has {factor} of shape {tuple(shape)}, which does not fit "
                    f"{where + ' of shape ' + str(tuple(factors[where].shape)) if where else 'a single column'}; "
                    "the file is damaged or of another format"
                )
    for factor, tensor in factors.items():
        if tensor.dtype not in _DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise LowrankError(
                f"{name} has {factor} in {kind}, which adapters are not computed in; convert the file to bf16 or fp32"
            )
        if not torch.isfinite(tensor).all():
            raise LowrankError(
                f"{name} has {factor} with numbers that are not finite; take an earlier checkpoint of the adapter"
            )
    # Of an AdaLoRA layer every direction may be pruned.
    if method != "adalora" and any(not factor.numel() for factor in factors.values()):
        raise LowrankError(f"{name} has rank 0: its factors hold no numbers; leave the module out of the file")
    return lengths.get("r", lengths.get("s", (0, "")))[0]


def _is_grouped(factors: Mapping[str, Tensor]) -> bool:
    down, up = factors["lora_A"], factors["lora_B"]
    if down.dim() < 3 or up.dim() != down.dim() or not up.numel() or up.shape[1] == down.shape[0]:
        return False
    groups, rest = divmod(down.shape[0], up.shape[1])
    return not rest and groups > 1 and not down.shape[1] % groups and not up.shape[0] % groups


def _choices(method: str) -> str:
    return ", or ".join(_list(names) for names in _SETS[method])


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def some(names: Iterable[str], most: int = 5) -> str:
    """The first few of many names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shortened, names[:most])) + more
