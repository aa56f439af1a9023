"""Replace the weights of a model by factors, in place, and say what was done."""

# torch leaves the types of modules it yields partly open.
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lowrank_core.candidates import Candidate, LeftEntry, check_patterns, find_candidates, matches, select
from lowrank_core.errors import UsageError
from lowrank_core.factorizations import Factorization, Hadamard, Kronecker, LowRank, Svd, num_parameters
from lowrank_core.init import Init, check_init
from lowrank_core.layers import FactorizedConv2d, FactorizedLinear, FactorizedLSTM, FactorizedWeight
from lowrank_core.ranks import FixedRank, Gamma, RankRule, Ratio, gamma_within, parse_budget, rank_for

METHODS = ("lowrank", "fedpara", "pfedpara", "svd", "kronecker")


@dataclass(frozen=True)
class FactorizedEntry:
    """A weight that became factors."""

    name: str
    type: str
    shape: tuple[int, ...]
    rank: int
    max_rank: int
    original_params: int
    params: int


@dataclass(frozen=True)
class FactorizeReport:
    """What `factorize` did to each weight it looked at, and the whole model's parameters before and after."""

    changed: tuple[FactorizedEntry, ...]
    left: tuple[LeftEntry, ...]
    original_params: int
    params: int

    def __str__(self) -> str:
        lines = [
            f"{e.name}: {'x'.join(map(str, e.shape))}, rank {e.rank} (reaches {e.max_rank}), "
            f"{e.original_params:,} -> {e.params:,}"
            for e in self.changed
        ]
        lines += [f"{e.name}: left, {e.reason}" for e in self.left]
        share = self.params / self.original_params
        return "\n".join([*lines, f"{self.original_params:,} -> {self.params:,} parameters ({share:.1%})"])


def factorization_of(method: str, *, tanh: bool = False) -> Factorization:
    """The factorization behind a method's name, one of `METHODS`.

    Raises:
        UsageError: the name is none of them, or tanh is asked of a method that has no such form.
    """
    if tanh and method != "fedpara":
        raise UsageError(f"tanh is a form of fedpara alone, got method {method!r}")
    if method == "lowrank":
        return LowRank()
    if method in ("fedpara", "pfedpara"):
        return Hadamard(tanh=tanh, plus_one=method == "pfedpara")
    if method in ("svd", "kronecker"):
        return Svd() if method == "svd" else Kronecker()
    raise UsageError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


def factorize(
    model: nn.Module,
    method: str = "fedpara",
    *,
    gamma: float | None = None,
    ratio: float | None = None,
    rank: int | None = None,
    budget: int | str | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    exceptions: Mapping[str, RankRule] | None = None,
    init: Init = "calibrated",
    tanh: bool = False,
) -> FactorizeReport:
    """Replace the weights of every Linear, Conv2d and LSTM in `model` by freshly drawn factors, in place.

    Args:
        method: `lowrank`, `fedpara`, `pfedpara`, `svd` or `kronecker`.
        gamma: the paper's rank rule. It, `ratio`, `rank` and `budget` are rules, of which exactly one is given.
        ratio: that of the authors' notebook.
        rank: the same one everywhere.
        budget: the size of the whole model, which becomes the largest gamma that keeps to it.
        include: shell-style patterns of layer names; a pattern that names a module covers what is in it.
        exclude: likewise, of what stays as it is.
        exceptions: patterns whose layers follow a rule of their own.
        init: how the factors are drawn (`lowrank_core.init`), from torch's global random state.
        tanh: FedPara with tanh around both terms.

    A weight stays as it is where factors would hold as many numbers or more, where it is shared with another
    module, or where the layer has an option that factors do not cover; the report names it. Biases are kept.

    Raises:
        UsageError: not exactly one rule, a value out of range, a pattern that matches no layer.
        LowrankError: no layer to factorize, or a budget below the smallest size.
    """
    factorization = factorization_of(method, tanh=tanh)
    check_init(init, factorization)
    original_params = _count(model)
    candidates, left = find_candidates(model)
    chosen, excluded = select(candidates, include, exclude)
    left += excluded
    exceptions = exceptions or {}
    check_patterns(exceptions, candidates)

    def rank_of(candidate: Candidate, rule: RankRule) -> int:
        own = next((r for pattern, r in exceptions.items() if matches(candidate.name, pattern)), rule)
        return rank_for(own, factorization, candidate.shape)

    def size_under(rule: RankRule) -> int:
        saved = (c.size - num_parameters(factorization, c.shape, rank_of(c, rule)) for c in chosen)
        return original_params - sum(max(0, s) for s in saved)

    rule = _rule(gamma, ratio, rank, budget, size_under)
    ranks: dict[str, dict[str, int]] = {}
    changed: list[FactorizedEntry] = []
    for c in chosen:
        r = rank_of(c, rule)
        params = num_parameters(factorization, c.shape, r)
        if params >= c.size:
            left.append(
                LeftEntry(c.name, f"rank {r} factors would hold {params:,} numbers, the weight holds {c.size:,}")
            )
            continue
        ranks.setdefault(c.module_name, {})[c.weight_name] = r
        reach = factorization.reachable_rank(c.shape, r)
        changed.append(FactorizedEntry(c.name, c.type, c.shape, r, reach, c.size, params))
    for name, weights in ranks.items():
        _replace(model, name, _factorized(model.get_submodule(name), factorization, weights, init))
    return FactorizeReport(tuple(changed), tuple(left), original_params, _count(model))


def _rule(
    gamma: float | None,
    ratio: float | None,
    rank: int | None,
    budget: int | str | None,
    size_under: Callable[[RankRule], int],
) -> RankRule:
    given = {"gamma": gamma, "ratio": ratio, "rank": rank, "budget": budget}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        found = " and ".join(named) or "none"
        raise UsageError(f"factorize takes exactly one of gamma, ratio, rank and budget, got {found}")
    if gamma is not None:
        return Gamma(gamma)
    if ratio is not None:
        return Ratio(ratio)
    if rank is not None:
        return FixedRank(rank)
    assert budget is not None
    return gamma_within(parse_budget(budget), size_under)


def _factorized(module: nn.Module, factorization: Factorization, ranks: dict[str, int], init: Init) -> nn.Module:
    new: nn.Module
    if isinstance(module, nn.LSTM):
        new = FactorizedLSTM(module, factorization, ranks=ranks)
    elif isinstance(module, nn.Linear):
        new = FactorizedLinear(
            module.in_features,
            module.out_features,
            factorization,
            rank=ranks["weight"],
            bias=False,
            device=module.weight.device,
            dtype=module.weight.dtype,
        )
        new.bias = module.bias
    else:
        assert isinstance(module, nn.Conv2d)
        new = FactorizedConv2d(
            module.in_channels,
            module.out_channels,
            _pair(module.kernel_size),
            factorization,
            rank=ranks["weight"],
            stride=_pair(module.stride),
            padding=module.padding if isinstance(module.padding, str) else _pair(module.padding),
            dilation=_pair(module.dilation),
            groups=module.groups,
            bias=False,
            device=module.weight.device,
            dtype=module.weight.dtype,
        )
        new.bias = module.bias  # pyright: ignore[reportAttributeAccessIssue] - torch's stubs forget it may be None
    if init != "calibrated":  # the layers draw themselves calibrated
        for weight in new.modules():
            if isinstance(weight, FactorizedWeight):
                weight.reset_parameters(init)
    return new.train(module.training)


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    first, second = value
    return first, second


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` everywhere the module called `name` stands: a module may be used under several names."""
    old = model.get_submodule(name)
    names = [path for path, module in model.named_modules(remove_duplicate=False) if module is old]
    for path in names:
        parent, _, child = str(path).rpartition(".")
        setattr(model.get_submodule(parent), child, new)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
