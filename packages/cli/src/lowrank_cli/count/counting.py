"""A case counted on a model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowrank_cli.count.cases import Case, Options, adapter_config, number
from lowrank_cli.count.models import CountedModel

if TYPE_CHECKING:
    from lowrank_core.costs.arithmetic import Arithmetic
    from lowrank_core.costs.report import CostReport
    from lowrank_core.ranks import RankRule


@dataclass(frozen=True)
class Counted:
    """A case's cost, and how it was asked for."""

    model: str
    case: Case
    target: str | None
    report: "CostReport"
    arithmetic: "Arithmetic | None"


def count(
    model: CountedModel, case: Case, target: str | None, options: Options, number_bytes: int, batch_size: int
) -> Counted:
    """The cost of a case on a model.

    Raises:
        UsageError: a value that is no number or out of range, a target that matches nothing.
        LowrankError: a budget below the smallest size, no layer that the method could change.
    """
    if case.method == "original":
        from lowrank_core.costs.arithmetic import Arithmetic
        from lowrank_core.costs.factorized import count_original

        flops = model.cost.flops if model.cost else None
        arithmetic = None if flops is None else Arithmetic(flops, flops, 0, 0.0)
        return Counted(model.name, case, None, count_original(model.model), arithmetic)
    if case.is_adapter:
        return _count_adapter(model, case, target, options, number_bytes, batch_size)
    return _count_factorized(model, case, target, number_bytes, batch_size)


def _count_adapter(
    model: CountedModel, case: Case, target: str | None, options: Options, number_bytes: int, batch_size: int
) -> Counted:
    from lowrank_core.costs.adapters import count_adapter, largest_fitting
    from lowrank_core.costs.arithmetic import arithmetic_of_adapter
    from lowrank_core.costs.targets import TARGETS, default_target, named_targets
    from lowrank_core.ranks import parse_budget

    target = target or default_target(model.model)
    # "all-linear" is PEFT's word: it leaves out a language model's head.
    targets = named_targets(model.model, target) if target in TARGETS and target != "all-linear" else target
    if case.kind == "budget":
        # Twelve to eight, if AdaLoRA's ranks are to keep their proportion.
        config = largest_fitting(
            model.model, adapter_config(case, targets, options, 12), parse_budget(case.value, number_bytes)
        )
    else:
        config = adapter_config(case, targets, options, int(number(case.value, "--rank", int)))
    report = count_adapter(model.model, config)
    arithmetic = arithmetic_of_adapter(model.model, config, model.cost, batch_size) if model.cost else None
    return Counted(model.name, case, target, report, arithmetic)


def _count_factorized(
    model: CountedModel, case: Case, target: str | None, number_bytes: int, batch_size: int
) -> Counted:
    from lowrank_core.costs.arithmetic import arithmetic_of_factorized
    from lowrank_core.costs.factorized import count_factorized
    from lowrank_core.costs.targets import TARGETS, matching_candidates, named_targets

    include = ["*"]
    if target is not None:
        wanted = named_targets(model.model, target) if target in TARGETS else matching_candidates(model.model, target)
        include = wanted
    report = count_factorized(
        model.model,
        case.method,
        _rule(case, number_bytes),
        include=include,
        # Layers that are asked for by name are meant, whatever the paper leaves whole.
        exclude=model.exclude if target is None else (),
        exceptions=model.rules,
    )
    arithmetic = arithmetic_of_factorized(model.model, report, model.cost, batch_size) if model.cost else None
    return Counted(model.name, case, target, report, arithmetic)


def _rule(case: Case, number_bytes: int) -> "RankRule | int":
    from lowrank_core.ranks import FixedRank, Gamma, Ratio, parse_budget

    if case.kind == "budget":
        return parse_budget(case.value, number_bytes)
    if case.kind == "rank":
        return FixedRank(int(number(case.value, "--rank", int)))
    return (Gamma if case.kind == "gamma" else Ratio)(number(case.value, f"--{case.kind}", float))
