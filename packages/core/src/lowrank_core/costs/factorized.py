"""What `factorize` would make of a model, without making it."""

from collections.abc import Mapping, Sequence

from torch import nn

from lowrank_core.candidates import Candidate, LeftEntry, find_candidates, matches, select
from lowrank_core.costs.report import CostReport, LayerCost, total
from lowrank_core.factorizations import Factorization, num_parameters
from lowrank_core.ranks import Gamma, RankRule, Ratio, gamma_within, rank_for
from lowrank_core.replacement import factorization_of


def count_factorized(
    model: nn.Module,
    method: str,
    rule: RankRule | int,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    exceptions: Mapping[str, RankRule] | None = None,
) -> CostReport:
    """The cost of `method` on `model`, which may be on the meta device and stays as it is.

    Layers, ranks and sizes are those of `lowrank_core.factorize`. rule: a rank rule, or a budget: the parameters
    that the whole model may hold, for which the largest gamma is found.

    Raises:
        UsageError: an unknown method, a pattern that matches no layer.
        LowrankError: no layer to factorize, or a budget below the smallest size.
    """
    factorization = factorization_of(method)
    candidates, left = find_candidates(model)
    chosen, excluded = select(candidates, include, exclude)
    original = count_parameters(model)

    def entries_under(rule: RankRule) -> list[LayerCost]:
        return [_entry(c, factorization, _own(c, rule, exceptions or {})) for c in chosen]

    def size_under(rule: RankRule) -> int:
        return original - sum(max(0, e.original_params - e.params) for e in entries_under(rule))

    words = "budget" if isinstance(rule, int) else in_words(rule)
    if isinstance(rule, int):
        rule = gamma_within(rule, size_under)
        words = in_words(rule)
    entries = entries_under(rule)
    changed = tuple(e for e in entries if e.params < e.original_params)
    unchanged = [
        LeftEntry(
            e.name, f"rank {e.rank} factors would hold {e.params:,} numbers, the weight holds {e.original_params:,}"
        )
        for e in entries
        if e.params >= e.original_params
    ]
    params = original - sum(e.original_params for e in changed) + total(changed)
    return CostReport(
        method=method,
        rule=words,
        layers=changed,
        left=(*left, *excluded, *unchanged),
        original_params=original,
        params=params,
        trainable_params=params,
        transferred_params=params + count_float_buffers(model) - sum(e.local_params for e in changed),
    )


def count_original(model: nn.Module) -> CostReport:
    """The model as it is: nothing changes, everything is trained and travels."""
    params = count_parameters(model)
    return CostReport("original", "", (), (), params, params, params, params + count_float_buffers(model))


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_float_buffers(model: nn.Module) -> int:
    """Numbers in the floating-point buffers of the state, such as running means, which travel with a whole model."""
    state = model.state_dict(keep_vars=True)
    return sum(t.numel() for t in state.values() if t.is_floating_point() and not isinstance(t, nn.Parameter))


def in_words(rule: RankRule) -> str:
    """`gamma 0.1`, `ratio 0.5`, `rank 8`."""
    if isinstance(rule, Gamma):
        return f"gamma {rule.gamma:.4g}"
    return f"ratio {rule.ratio:g}" if isinstance(rule, Ratio) else f"rank {rule.rank}"


def _own(candidate: Candidate, rule: RankRule, exceptions: Mapping[str, RankRule]) -> RankRule:
    return next((own for pattern, own in exceptions.items() if matches(candidate.name, pattern)), rule)


def _entry(candidate: Candidate, factorization: Factorization, rule: RankRule) -> LayerCost:
    shape, rank = candidate.shape, rank_for(rule, factorization, candidate.shape)
    params = num_parameters(factorization, shape, rank)
    # pFedPara's second term stays with the client.
    local = params // 2 if getattr(factorization, "plus_one", False) else 0
    reach = factorization.reachable_rank(shape, rank)
    return LayerCost(candidate.name, candidate.type, shape, rank, reach, candidate.size, params, local)
