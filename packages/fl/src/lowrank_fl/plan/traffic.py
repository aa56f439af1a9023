"""The bytes of a run's rounds, from the messages that Flower's strategies really make."""

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor

from lowrank_fl.aggregation import FactorAggregation
from lowrank_fl.config import RunConfig
from lowrank_fl.flower.base_model import BaseModel
from lowrank_fl.flower.evaluation import measure_evaluation
from lowrank_fl.flower.rounds import measure_round
from lowrank_fl.flower.wire import Wire
from lowrank_fl.ranks.cost import RankCost
from lowrank_fl.seeds import derive_seed


def measure(
    config: RunConfig,
    state: Mapping[str, Tensor],
    parameters: Sequence[str],
    aggregation: FactorAggregation,
    base: BaseModel | None,
) -> tuple[int, int, int]:
    """All rounds' bytes down, up, and of having clients test: those of each turn of the factors, as often as it comes.

    They are taken after a first round, where that makes a difference. With updates they depend on who took part when,
    so every round is measured, with the clients that the run will sample.
    """
    wire = Wire(config.codec, config.seed, base)
    turns = config.rounds if base else aggregation.turns
    spare = turns if config.codec.down == "topk" else 0
    totals = [0, 0, 0]
    for number in range(1, spare + min(turns, config.rounds) + 1):
        if number < spare:
            continue
        sampling = derive_seed(config.seed, "sampling", number) if base else 0
        down, up = measure_round(
            config.strategy,
            config.federation,
            state,
            parameters,
            wire,
            number,
            aggregation,
            sampling,
            privacy=config.privacy,
        )
        tested = 0
        if config.partition.held_out:
            tested = measure_evaluation(config.strategy, config.federation, state, wire, number)
        if number > spare:
            times = len(range(number - spare, config.rounds + 1, turns))
            totals = [total + times * each for total, each in zip(totals, (down, up, tested), strict=True)]
    downlink, uplink, evaluation = totals
    return downlink, uplink, evaluation


def measure_ranks(config: RunConfig, parameters: Sequence[str], ranks: RankCost) -> tuple[int, int, int]:
    """The same with AdaLoRA, whose budget differs from round to round."""
    wire, tested = Wire(config.codec, config.seed), config.partition.held_out > 0
    totals = [0, 0, 0]
    trains, tests = Counter(ranks.budgets[:-1]), Counter(ranks.budgets[1:] if tested else ())
    for budget in trains | tests:
        state = ranks.state(budget)
        down, up = measure_round(config.strategy, config.federation, state, parameters, wire, directions=budget)
        each = measure_evaluation(config.strategy, config.federation, state, wire) if tested else 0
        counts = (trains[budget] * down, trains[budget] * up, tests[budget] * each)
        totals = [total + more for total, more in zip(totals, counts, strict=True)]
    downlink, uplink, evaluation = totals
    return downlink, uplink, evaluation
