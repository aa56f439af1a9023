"""LoKr in files: what its shapes say of `decompose_factor`, and scales where both sides are whole.

ComfyUI and LyCORIS scale a LoKr by alpha / rank, with the rank read from a decomposed side; where neither is, they
apply no scale. PEFT always applies one.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank_core.adapters.forms.lokr import split

Factors = Mapping[str, Tensor]


def sides_of(factors: Factors) -> tuple[int, int, int, int]:
    """(a, b, c, d) of W1 (a, c) and W2 (b, d, ...); d of a flat convolution counts its kernel's pixels too."""
    if "lokr_w1" in factors:
        a, c = factors["lokr_w1"].shape
    else:
        a, c = factors["lokr_w1_a"].shape[0], factors["lokr_w1_b"].shape[1]
    if "lokr_w2" in factors:
        b, d = factors["lokr_w2"].shape[:2]
    elif "lokr_t2" in factors:
        b, d = factors["lokr_w2_a"].shape[1], factors["lokr_w2_b"].shape[1]
    else:
        b, d = factors["lokr_w2_a"].shape[0], factors["lokr_w2_b"].shape[1]
    return a, b, c, d


def factor_of(modules: Mapping[str, Factors]) -> int:
    """The `decompose_factor` that splits every module's outputs as its factors are; -1 where there is none.

    Inputs follow the same rule, but those of a flat convolution are not known without its kernel.
    """
    sides = [sides_of(factors) for factors in modules.values()]
    candidates = [-1, *sorted({a for a, *_ in sides} | {c for _, _, c, _ in sides}, reverse=True)]

    def explains(factor: int) -> bool:
        for (a, b, c, d), factors in zip(sides, modules.values(), strict=True):
            flat = "lokr_w2" not in factors and "lokr_t2" not in factors
            if split(a * b, factor) != (a, b) or (not flat and split(c * d, factor) != (c, d)):
                return False
        return True

    return next((factor for factor in candidates if explains(factor)), -1)


def full_rank(factors: Factors) -> int:
    """The smallest rank at which PEFT leaves both sides of these shapes whole."""
    a, b, c, d = sides_of(factors)
    return max((max(a, b, c, d) + 1) // 2, 1)


def wrapped_sides(factors: Factors, scaling: float, rank: int) -> tuple[dict[str, Tensor], float]:
    """Factors and alpha with which a reader that divides alpha by the rank it sees gets `scaling`.

    Where both sides are whole the scale goes into W1 if it comes out again to the bit (as for powers of two), and else
    into an alpha of W1 written as W1 · 1, which ComfyUI reads and LyCORIS, which needs both sides decomposed, does not.
    """
    factors = dict(factors)
    if "lokr_w2_b" in factors or "lokr_w1_b" in factors:
        side = "lokr_w2_b" if "lokr_w2_b" in factors else "lokr_w1_b"
        return factors, scaling * factors[side].shape[0]
    if scaling == 1:
        return factors, rank
    first = factors["lokr_w1"]
    scaled = first * scaling
    if torch.equal(scaled / scaling, first):
        return {**factors, "lokr_w1": scaled}, rank
    del factors["lokr_w1"]
    inputs = first.shape[1]
    identity = torch.eye(inputs, dtype=first.dtype, device=first.device)
    return {"lokr_w1_a": first, "lokr_w1_b": identity, **factors}, scaling * inputs


def unwrapped_sides(factors: Factors, scaling: float, rank: int) -> dict[str, Tensor]:
    """What `wrapped_sides` was given, where the scaling and the rank are known."""
    factors = dict(factors)
    whole = "lokr_w2" in factors
    if whole and "lokr_w1" in factors and scaling != 1:
        factors["lokr_w1"] = factors["lokr_w1"] / scaling
    elif whole and "lokr_w1_b" in factors:
        first, second = factors["lokr_w1_a"], factors["lokr_w1_b"]
        if first.shape[1] != rank and torch.equal(second, torch.eye(len(second), dtype=second.dtype)):
            del factors["lokr_w1_b"], factors["lokr_w1_a"]
            factors = {"lokr_w1": first, **factors}
    return factors
