"""How factors are drawn: calibrated (ours), the paper's and Flower's.

What matters is the variance of the *composed* weight. He et al. (2015) ask for 2 / fan_in.
Drawing each factor by He's rule for its own shape, as the authors' notebook does, composes to
a standard deviation of 0.8 to 4 % of that on VGG16's layers, less the wider the layer is;
the fan-out form, as Flower's baseline has it, to 0.8 to 1.6 times. `calibrated` solves the
factors' variance so that the expectation is exact, then rescales the draw, because a single draw
of a rank-2 layer can be off by a factor of two.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lowrank_core.errors import UsageError
from lowrank_core.factorizations import Factorization, Hadamard, Kronecker, LowRank, Svd
from lowrank_core.factorizations.term import split_shape

Init = Literal["calibrated", "paper", "flower"]

# A tanh cannot give a variance near 1; inputs this few are drawn as if they were more.
_MOST_VARIANCE_OF_TANH = 0.8


def init_factors(
    factors: dict[str, Tensor],
    factorization: Factorization,
    weight_shape: Sequence[int],
    init: Init = "calibrated",
) -> None:
    """Fill `factors` in place from torch's global random state; factors on the meta device stay as they are.

    Raises:
        ValueError: `init` is none of the three names.
        UsageError: it is one of FedPara's, and the factors are of another kind (`check_init`).
    """
    check_init(init, factorization)
    first = next(iter(factors.values()))
    if first.is_meta:
        return
    rank = first.shape[0 if isinstance(factorization, Kronecker) else 1]
    if init == "calibrated":
        stds = calibrated_stds(factorization, weight_shape, rank)
    elif init in ("paper", "flower"):
        stds = {name: math.sqrt(2 / _fan(factor, name, init)) for name, factor in factors.items()}
    else:
        raise ValueError(f"init must be calibrated, paper or flower, got {init!r}")
    with torch.no_grad():
        for name, factor in factors.items():
            factor.normal_(0.0, stds[name])
        if init == "calibrated":
            _rescale(factors, factorization, weight_shape)


def check_init(init: str, factorization: Factorization) -> None:
    """Raise a UsageError where `init` was given for FedPara's factors alone."""
    if init in ("paper", "flower") and isinstance(factorization, Svd | Kronecker):
        raise UsageError(
            f"init {init!r} says how FedPara's factors are drawn, not those of {type(factorization).__name__}; "
            "use calibrated"
        )


def he_variance(weight_shape: Sequence[int]) -> float:
    """2 / fan_in, fan_in = inputs of a group x kernel size (He et al., 2015, Eq. 10)."""
    return 2 / math.prod(weight_shape[1:])


def calibrated_stds(factorization: Factorization, weight_shape: Sequence[int], rank: int) -> dict[str, float]:
    """The standard deviation of each factor under which the composed weight has He's variance.

    A term's entries are sums of R products of two independent numbers (R² products of three for
    kernels), so its variance v is R·vX·vY (R²·vT·vX·vY); the factors share it equally. Then

        low-rank   v = He
        Hadamard   v·v = He
        pFedPara   v·(1 + v) = He
        tanh       Var[tanh(N(0, v))]² = He, solved numerically; exact as R grows.

    Kronecker's W is a sum of R products of two numbers as well, R·v² = He. In P diag(λ) Q, P and Q have directions of
    length 1 in expectation, and λ the variance that is left, 2·O / R.
    """
    variance = he_variance(weight_shape)
    if isinstance(factorization, Svd):
        outputs, inputs = weight_shape[0], math.prod(weight_shape[1:])
        return {"left": 1 / math.sqrt(outputs), "values": math.sqrt(2 * outputs / rank), "right": 1 / math.sqrt(inputs)}
    if isinstance(factorization, Kronecker):
        return dict.fromkeys(("w1", "w2"), math.sqrt(math.sqrt(variance / rank)))
    if isinstance(factorization, LowRank):
        term = variance
    elif factorization.plus_one:
        term = (math.sqrt(1 + 4 * variance) - 1) / 2
    elif factorization.tanh:
        target = min(math.sqrt(variance), _MOST_VARIANCE_OF_TANH)
        term = _solve_increasing(tanh_variance, target)
    else:
        term = math.sqrt(variance)
    _, _, kernel = split_shape(weight_shape)
    factor = (term / rank**2) ** (1 / 3) if kernel else (term / rank) ** (1 / 2)
    return dict.fromkeys(factorization.shapes(weight_shape, rank), math.sqrt(factor))


def tanh_variance(variance: float) -> float:
    """Var[tanh(z)] for z ~ N(0, variance), by the trapezoid rule over ±8 standard deviations."""
    z = np.linspace(-8, 8, 2001)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return float(np.trapezoid(np.tanh(z * math.sqrt(variance)) ** 2 * density, z))


def _rescale(factors: dict[str, Tensor], factorization: Factorization, weight_shape: Sequence[int]) -> None:
    """Scale the factors so that the composed weight's mean square is He's, to a part in a million."""
    target = he_variance(weight_shape)
    exact = {name: factor if factor.dtype == torch.float64 else factor.float() for name, factor in factors.items()}
    if isinstance(factorization, Hadamard) and factorization.tanh:
        scale = _scale_under_tanh(*factorization.terms(exact, weight_shape), min(target, _MOST_VARIANCE_OF_TANH**2))
        names, count = list(factors), len(factors) // 2
    else:
        scale = math.sqrt(target / factorization.compose(exact, weight_shape).square().mean().item())
        # W is linear in W1 but not, under "+ 1", in W2.
        plus_one = isinstance(factorization, Hadamard) and factorization.plus_one
        names = [name for name in factors if not plus_one or name.endswith("1")]
        names = ["values"] if isinstance(factorization, Svd) else names
        count = len(names)
    for name in names:
        factors[name].mul_(scale ** (1 / count))


def _scale_under_tanh(first: Tensor, second: Tensor, target: float) -> float:
    """The c at which tanh(c·W1) ⊙ tanh(c·W2) has mean square `target`.

    The mean square goes as c⁴ where tanh is straight and more slowly where it bends, so steps of the
    fourth root never overshoot by much.
    """
    scale = 1.0
    for _ in range(100):
        reached = (torch.tanh(scale * first) * torch.tanh(scale * second)).square().mean().item()
        if abs(reached / target - 1) < 1e-6:
            break
        scale *= (target / reached) ** 0.25
    return scale


def _fan(factor: Tensor, name: str, init: Init) -> float:
    # Both sources store X and Y as (R, out) and (R, in), so their fan_in is our first dimension.
    rank = factor.shape[1]
    if name.startswith("t"):
        return rank * math.prod(factor.shape[2:])
    return factor.shape[0] if init == "paper" else rank


def _solve_increasing(function: Callable[[float], float], target: float) -> float:
    """The argument at which an increasing function from 0 reaches `target`, to double precision."""
    low, high = 0.0, 1.0
    while function(high) < target:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < target else (low, middle)
    return (low + high) / 2
