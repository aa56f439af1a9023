"""What a run would cost, found out without training: parameters, traffic, arithmetic and time on this machine."""

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_core.candidates import LeftEntry
from lowrank_core.replacement import FactorizedEntry, FactorizeReport
from lowrank_fl.aggregation import FactorAggregation
from lowrank_fl.clients import examples_of
from lowrank_fl.config import RunConfig
from lowrank_fl.flops import CountFlops, Undrawn
from lowrank_fl.flower.base_model import BaseModel
from lowrank_fl.flower.engines import worker_count
from lowrank_fl.flower.evaluation import measure_evaluation
from lowrank_fl.flower.rounds import measure_round
from lowrank_fl.flower.wire import Wire
from lowrank_fl.load import expand
from lowrank_fl.models.adapted import put_adapter
from lowrank_fl.models.build import build_model
from lowrank_fl.ranks.cost import RankCost
from lowrank_fl.ranks.layers import fit
from lowrank_fl.run import check_device
from lowrank_fl.seeds import derive_seed
from lowrank_fl.state import local_names, personalization_of, trained_names, transferred
from lowrank_fl.timing import time_steps, torch_threads
from lowrank_fl.training import backward, training_only
from lowrank_fl.updates.layers import put_updates

# No step that takes much longer is timed whole: some seconds of a core.
_TIMED_FLOPS = 200_000_000_000


@dataclass(frozen=True)
class DataShape:
    """What a plan must know of a data set: an example's shape, how many classes, training and test examples."""

    input_shape: tuple[int, ...]
    classes: int
    examples: int
    test_examples: int
    makers: int | None = None
    """Who made the training examples, where that is known; a natural partition leaves out all but one a client."""


# So that a plan needs no download, or no file of one's own; the tests hold these against the loaders.
_SHAPES = {
    "digits": DataShape((1, 8, 8), 10, 1442, 355),
    "cifar10": DataShape((3, 32, 32), 10, 50_000, 10_000),
    "cifar100": DataShape((3, 32, 32), 100, 50_000, 10_000),
    "cinic10": DataShape((3, 32, 32), 10, 90_000, 90_000),
    "mnist": DataShape((1, 28, 28), 10, 60_000, 10_000),
    "emnist": DataShape((1, 28, 28), 62, 697_932, 116_323),
    # flwrlabs/femnist, which has no test split.
    "femnist": DataShape((1, 28, 28), 62, 814_277, 0, makers=3_597),
    # All plays by speaking role, public domain; another edition has about as many.
    "shakespeare": DataShape((80,), 80, 659_471, 155_023, makers=850),
}


@dataclass(frozen=True)
class RunPlan:
    """One run's cost; bytes and seconds are those of all its rounds.

    AdaLoRA's ranks are shared out evenly among layers, as nobody knows before training how they will fall. `params`,
    `transferred_params` and `model_bytes` are the model's that the run ends with, `layers` those it begins with.
    """

    name: str
    method: str
    swept: dict[str, Any]
    rounds: int
    clients: int
    clients_per_round: int
    params: int
    transferred_params: int
    original_params: int
    model_bytes: int
    """Transferred parameters in the bytes of their dtype."""
    uplink_bytes: int
    downlink_bytes: int
    total_bytes: int
    """What Flower would serialise, headers included."""
    paper_bytes: int
    """The paper's arithmetic: 2 x participants x model size x rounds (section 3.2); upwards what is trained alone."""
    flops_per_round: int
    """Of the clients' training, forward and backward, that before a test included; a multiply-add counts as two."""
    seconds: float
    """Of training and evaluation, estimated from timed steps, on this machine while it runs nothing else."""
    layers: tuple[FactorizedEntry, ...]
    left: tuple[LeftEntry, ...]
    evaluation_bytes: int = 0
    """What Flower would serialise to have clients test; 0 where the server does."""

    @property
    def client_bytes(self) -> float:
        """That a client which is asked to train receives and sends in a round; the mean over rounds."""
        return self.total_bytes / self.rounds / self.clients_per_round


@dataclass(frozen=True)
class Plan:
    runs: list[RunPlan]


def plan(config: RunConfig) -> Plan:
    """The cost of every run of `config`. Nothing is trained, and no data is read where its shape is known.

    Raises:
        LowrankError: a data set whose shape is not known cannot be read.
    """
    check_device(config.device)
    return Plan([_plan_run(single, swept) for single, swept in expand(config)])


def _plan_run(config: RunConfig, swept: dict[str, Any]) -> RunPlan:
    data, federation = _data_shape(config), config.federation
    model, report = _build(config, data)
    params = report.params if report else sum(parameter.numel() for parameter in model.parameters())
    personalization = personalization_of(config)
    state = transferred(model, personalization)
    aggregation = FactorAggregation(config.aggregation, model)
    base = BaseModel.of(model, config.update.interval)
    returned = [aggregation.returned(number) for number in range(1, config.rounds + 1)]
    trained, ranks = trained_names(model, personalization), RankCost.of(config, model)
    if ranks:
        downlink, uplink, evaluation = _measure_ranks(config, trained, ranks)
        sent = [ranks.state(budget) for budget in ranks.budgets]
        first, state = state, sent.pop()
        params -= sum(tensor.numel() for tensor in first.values()) - sum(tensor.numel() for tensor in state.values())
        fit(model, ranks.state(ranks.mean_budget))
    else:
        downlink, uplink, evaluation = _measure(config, state, trained, aggregation, base)
        sent = [state] * config.rounds
    paper_bytes = sum(tensor.nbytes for tensors in sent for tensor in tensors.values())
    for tensors, names in zip(sent, returned, strict=True):
        paper_bytes += sum(tensor.nbytes for name, tensor in tensors.items() if names is None or name in names)
    held = _trained_examples(config, data)
    steps = math.ceil(held / federation.batch_size)
    with torch_threads(config.engine.threads):
        epochs: list[tuple[int, float]] = []
        for phase in _phases(config, model, aggregation):
            with training_only(model, phase.only):
                per_step, per_example = _count_step(model, config, data)
            epochs.append((phase.clients, phase.epochs * (steps * per_step + held * per_example)))
        seconds = _round_seconds(model, config, data, epochs)
    flops = round(sum(clients * each for clients, each in epochs))
    return RunPlan(
        name=config.name,
        method=config.method,
        swept=swept,
        rounds=config.rounds,
        clients=federation.clients,
        clients_per_round=federation.clients_per_round,
        params=params,
        transferred_params=sum(tensor.numel() for tensor in state.values()),
        original_params=report.original_params if report else params,
        model_bytes=sum(tensor.nbytes for tensor in state.values()),
        uplink_bytes=uplink,
        downlink_bytes=downlink,
        total_bytes=uplink + downlink,
        evaluation_bytes=evaluation,
        paper_bytes=federation.clients_per_round * paper_bytes,
        flops_per_round=flops,
        seconds=config.rounds * seconds,
        layers=report.changed if report else (),
        left=report.left if report else (),
    )


def _measure(
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


def _measure_ranks(config: RunConfig, parameters: Sequence[str], ranks: RankCost) -> tuple[int, int, int]:
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


@dataclass(frozen=True)
class _Phase:
    """Epochs that each of so many clients trains in a round; all of the model, or the named parameters alone.

    Those of a turn of the factors are the share of it in all rounds.
    """

    clients: int
    epochs: float
    only: Collection[str] | None = None


def _phases(config: RunConfig, model: nn.Module, aggregation: FactorAggregation) -> list[_Phase]:
    federation, own = config.federation, personalization_of(config)
    sampled = federation.clients_per_round
    if own.kind == "fedrep":
        head, body = local_names(model, own), trained_names(model, own)
        phases = [_Phase(sampled, own.epochs, head), _Phase(sampled, federation.epochs, body)]
    else:
        turns = aggregation.turns
        phases = [_Phase(sampled, federation.epochs / turns, aggregation.returned(turn + 1)) for turn in range(turns)]
    if own.kind == "ditto":
        phases.append(_Phase(sampled, own.epochs))
    if own.test_epochs:
        phases.append(_Phase(federation.clients, own.test_epochs))
    return phases


def _trained_examples(config: RunConfig, data: DataShape) -> float:
    """That a client trains on, on average."""
    share = (1 - config.partition.held_out) * config.partition.train_share
    return share * data.examples / config.federation.clients


def _mean_batch(config: RunConfig, data: DataShape) -> int:
    """Examples of a step, on average."""
    held = _trained_examples(config, data)
    return math.ceil(held / math.ceil(held / config.federation.batch_size))


def _data_shape(config: RunConfig) -> DataShape:
    """Of the examples that the run's clients and its server hold."""
    data = config.data
    known = _SHAPES.get(data.name)
    # A text is read faster than it is trained on for a second, and nobody's is quite like ours. Of how many examples
    # a class has, only the data can tell.
    if known is None or data.classes is not None or (data.name == "shakespeare" and data.path is not None):
        examples = examples_of(config)
        makers = None if examples.groups is None else len(set(examples.groups))
        shape, classes = examples.input_shape, len(examples.classes)
        known = DataShape(shape, classes, len(examples.labels), len(examples.test_labels), makers)
    held = min(known.examples, data.max_examples or known.examples)
    if config.partition.kind == "natural" and known.makers is not None:
        held = held * config.federation.clients // known.makers
    tested = min(known.test_examples, data.max_test_examples or known.test_examples)
    return dataclasses.replace(known, examples=held, test_examples=tested)


def _build(config: RunConfig, data: DataShape) -> tuple[nn.Module, FactorizeReport | None]:
    """The run's network with any values: its own initialisation would take VGG16 seconds."""
    with torch.device("meta"), Undrawn():
        own = config.model.model_copy(update={"pretrained": False})
        model, report = build_model(own, data.input_shape, data.classes, seed=0)
        if config.adapter.method is not None:
            report = put_adapter(model, config.model.name, config.adapter, seed=0)
    state = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in model.state_dict().items()}
    for tensor in state.values():
        # Neither so large that the loss overflows nor so small that arithmetic on subnormal numbers slows it.
        tensor.normal_(0, 0.1) if tensor.ndim > 1 else tensor.fill_(1)
    model.load_state_dict(state, assign=True)
    if config.update.kind != "none":
        report = put_updates(model, config.model.name, config.update, seed=config.seed)
    return model, report


def _count_step(model: nn.Module, config: RunConfig, data: DataShape) -> tuple[int, int]:
    """FLOPs of a training step itself (composing weights and correcting them), and of each example in it."""

    def count(examples: int, jacobian_lambda: float) -> int:
        inputs = torch.randint(2, (examples, *data.input_shape))
        if len(data.input_shape) > 1:
            inputs = 2.0 * inputs - 1
        labels = torch.zeros(examples, dtype=torch.int64)
        # Without oneDNN, whose LSTM is one operation to the counter. Its TF32 is left alone: setting it warns.
        without = torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)  # pyright: ignore[reportArgumentType]
        with without, CountFlops() as counter:
            backward(model, inputs, labels, config.federation.lr, jacobian_lambda)
        return counter.total

    # How an adapter is computed may depend on the size of the batch.
    most = max(2, _mean_batch(config, data)) if config.adapter.method else 2
    per_example = count(most, 0) - count(most - 1, 0)
    per_step = count(most - 1, config.model.jacobian_lambda) - (most - 1) * per_example
    model.zero_grad()
    return per_step, per_example


def _round_seconds(model: nn.Module, config: RunConfig, data: DataShape, phases: Sequence[tuple[int, float]]) -> float:
    """Of the clients' training and the evaluation, from a step of as many examples as an epoch's have on average.

    phases: how many clients train, and the FLOPs of each.
    """
    workers = worker_count(config)
    per_step, per_example = _count_step(model, config, data)
    timed = max(1, min(_mean_batch(config, data), (_TIMED_FLOPS - per_step) // per_example))
    step, evaluation = time_steps(model, config, data.input_shape, timed)
    speed = (per_step + timed * per_example) / step
    training = sum(math.ceil(clients / workers) * flops / speed for clients, flops in phases)
    tested = config.partition.held_out * data.examples or data.test_examples
    return training + tested / timed * evaluation / workers
