"""The cost of every run of a configuration, put together."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowrank_core.candidates import LeftEntry
from lowrank_core.replacement import FactorizedEntry, FactorizeReport
from lowrank_fl.aggregation import FactorAggregation
from lowrank_fl.config import RunConfig
from lowrank_fl.flops import Undrawn
from lowrank_fl.flower.base_model import BaseModel
from lowrank_fl.load import expand
from lowrank_fl.models.adapted import put_adapter
from lowrank_fl.models.build import build_model
from lowrank_fl.plan.shapes import DataShape, data_shape
from lowrank_fl.plan.traffic import measure, measure_ranks
from lowrank_fl.plan.work import work
from lowrank_fl.ranks.cost import RankCost
from lowrank_fl.ranks.layers import fit
from lowrank_fl.run import check_device
from lowrank_fl.state import personalization_of, trained_names, transferred
from lowrank_fl.updates.layers import put_updates


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
    data, federation = data_shape(config), config.federation
    model, report = _build(config, data)
    params = report.params if report else sum(parameter.numel() for parameter in model.parameters())
    personalization = personalization_of(config)
    state = transferred(model, personalization)
    aggregation = FactorAggregation(config.aggregation, model)
    base = BaseModel.of(model, config.update.interval)
    returned = [aggregation.returned(number) for number in range(1, config.rounds + 1)]
    trained, ranks = trained_names(model, personalization), RankCost.of(config, model)
    if ranks:
        downlink, uplink, evaluation = measure_ranks(config, trained, ranks)
        sent = [ranks.state(budget) for budget in ranks.budgets]
        first, state = state, sent.pop()
        params -= sum(tensor.numel() for tensor in first.values()) - sum(tensor.numel() for tensor in state.values())
        fit(model, ranks.state(ranks.mean_budget))
    else:
        downlink, uplink, evaluation = measure(config, state, trained, aggregation, base)
        sent = [state] * config.rounds
    paper_bytes = sum(tensor.nbytes for tensors in sent for tensor in tensors.values())
    for tensors, names in zip(sent, returned, strict=True):
        paper_bytes += sum(tensor.nbytes for name, tensor in tensors.items() if names is None or name in names)
    flops, seconds = work(config, data, model, aggregation)
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
