"""SCAFFOLD and FedDyn against references by hand, on a convex problem whose optimum is known."""

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from lowrank_core import LowrankError
from lowrank_fl.client_state import ClientStates
from lowrank_fl.config import FederationConfig, StrategyConfig
from lowrank_fl.drift import feddyn_drift, feddyn_gradient, scaffold_control, scaffold_drift
from lowrank_fl.flower.grid import LocalGrid
from lowrank_fl.flower.records import to_arrays, to_record
from lowrank_fl.flower.screening import screen
from lowrank_fl.flower.strategies import load_strategy_state, make_strategy, strategy_state

CLIENTS, STEPS, LR = 4, 5, 0.05


class Quadratics:
    """Client i minimises (w - m_i)ᵀ diag(a_i) (w - m_i) / 2. FedAvg's many local steps miss the optimum of the sum."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.curvature = 0.5 + 4 * torch.rand(CLIENTS, 3, generator=generator, dtype=torch.float64)
        self.centers = torch.randn(CLIENTS, 3, generator=generator, dtype=torch.float64)
        self.optimum = (self.curvature * self.centers).sum(0) / self.curvature.sum(0)

    def gradient(self, client: int, w: Tensor) -> Tensor:
        return self.curvature[client] * (w - self.centers[client])


def federate(name: str, rounds: int, sampled: int = CLIENTS, resume_at: int | None = None) -> Tensor:
    """Rounds of the real strategy, over clients that take plain gradient steps."""
    problem = Quadratics()
    config = StrategyConfig(name=name, alpha=0.5)
    federation = FederationConfig(clients=CLIENTS, clients_per_round=sampled, lr=LR)
    own: list[dict[str, Tensor]] = [{} for _ in range(CLIENTS)]

    def reply(message: Message) -> Message:
        client = message.metadata.dst_node_id - 1
        records = message.content.array_records
        start = torch.from_numpy(to_arrays(records["arrays"])["w"].copy())
        alpha = float(message.content.config_records["config"].get("feddyn-alpha", 0.0))
        control = {}
        if "control" in records:
            control = {key: torch.from_numpy(value.copy()) for key, value in to_arrays(records["control"]).items()}
            drift = scaffold_drift(control, own[client])
        else:
            drift = feddyn_drift(own[client], alpha)
        w = start.clone()
        for _ in range(STEPS):
            gradient = problem.gradient(client, w) + drift.proximal * (w - start)
            w = w - LR * (gradient + drift.offsets.get("w", torch.zeros(3, dtype=torch.float64)))
        content = RecordDict({"arrays": to_record({"w": w}, shared=False)})
        if control:
            new = scaffold_control(control, own[client], {"w": start}, {"w": w}, STEPS, LR)
            content["control"] = to_record({"w": new["w"] - own[client].get("w", 0.0)}, shared=False)
            own[client] = dict(new)
        elif alpha:
            own[client] = dict(feddyn_gradient(own[client], {"w": start}, {"w": w}, alpha))
        content["metrics"] = MetricRecord({"num-examples": 10, "loss": 0.0})
        return Message(content, reply_to=message)

    grid = LocalGrid(CLIENTS, lambda messages: [reply(message) for message in messages], shared=False)
    strategy = make_strategy(config, federation, ["w"])
    arrays: ArrayRecord = to_record({"w": torch.zeros(3, dtype=torch.float64)}, shared=False)
    for number in range(1, rounds + 1):
        if number == resume_at:
            state = strategy_state(strategy)
            strategy = make_strategy(config, federation, ["w"])
            load_strategy_state(strategy, state, arrays)
        messages = list(strategy.configure_train(number, arrays, ConfigRecord({"lr": LR}), grid))
        aggregated, _ = strategy.aggregate_train(number, list(grid.send_and_receive(messages)))
        assert aggregated is not None
        arrays = aggregated
    return torch.from_numpy(np.array(arrays["w"].numpy()))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "reaches"), [("fedavg", False), ("scaffold", True), ("feddyn", True)])
def test_only_corrected_clients_reach_the_optimum_of_all(name, reaches):
    distance = (federate(name, 400) - Quadratics().optimum).norm().item()
    assert (distance < 1e-6) == reaches, distance


def test_scaffold_is_its_algorithm_written_out():
    """Algorithm 1 with option II and all clients, in ten lines."""
    problem = Quadratics()
    x, c = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    own = torch.zeros(CLIENTS, 3, dtype=torch.float64)
    for _ in range(6):
        trained, controls = [], []
        for client in range(CLIENTS):
            y = x.clone()
            for _ in range(STEPS):
                y = y - LR * (problem.gradient(client, y) - own[client] + c)
            trained.append(y)
            controls.append(own[client] - c + (x - y) / (STEPS * LR))
        x, own_next = torch.stack(trained).mean(0), torch.stack(controls)
        c, own = c + (own_next - own).mean(0), own_next
    torch.testing.assert_close(federate("scaffold", 6), x, rtol=1e-12, atol=1e-12)


def test_feddyn_is_its_algorithm_written_out():
    problem, alpha = Quadratics(), 0.5
    theta, h = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    gradients = torch.zeros(CLIENTS, 3, dtype=torch.float64)
    for _ in range(6):
        trained = []
        for client in range(CLIENTS):
            w = theta.clone()
            for _ in range(STEPS):
                w = w - LR * (problem.gradient(client, w) - gradients[client] + alpha * (w - theta))
            trained.append(w)
        stacked = torch.stack(trained)
        gradients = gradients - alpha * (stacked - theta)
        h = h - alpha * (stacked - theta).mean(0)
        theta = stacked.mean(0) - h / alpha
    torch.testing.assert_close(federate("feddyn", 6), theta, rtol=1e-12, atol=1e-12)


NAMES = ["fedavgm", "fedadam", "fedyogi", "fedadagrad", "scaffold", "feddyn", "fedmedian", "fedtrimmedavg", "krum"]


@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_goes_on_from_its_state_as_if_it_had_never_stopped(name):
    torch.testing.assert_close(federate(name, 6, resume_at=4), federate(name, 6), rtol=0, atol=0)


def replies_to(*changes):
    """Three clients' messages, and their replies, changed one by one."""
    LocalGrid(3, lambda messages: messages, shared=False)
    arrays = to_record({"w": torch.ones(2)}, shared=False)
    messages, replies = [], []
    for node, change in enumerate(changes, 1):
        message = Message(RecordDict({"arrays": arrays}), node, "train")
        message.metadata.__dict__["_message_id"] = str(node)
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 5, "loss": 0.1})})
        change(content)
        messages.append(message)
        replies.append(Message(content, reply_to=message))
    return replies, messages


def put(key, record):
    def change(content):
        content[key] = record

    return change


def record_of(**tensors):
    return to_record(tensors, shared=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (put("arrays", record_of(w=torch.tensor([1.0, torch.nan]))), "arrays holds numbers that are not finite"),
        (put("arrays", record_of(w=torch.ones(3))), "arrays/w is float32 (3,), not float32 (2,)"),
        (put("arrays", record_of(w=torch.ones(2).double())), "arrays/w is float64 (2,), not float32 (2,)"),
        (put("arrays", record_of(v=torch.ones(2))), "the arrays of arrays have other names than were sent"),
        (put("more", record_of(w=torch.ones(2))), "it sent the arrays arrays, more instead of arrays"),
        (put("metrics", MetricRecord({"num-examples": -1, "loss": 0.1})), "it reports -1 examples"),
    ],
)
def test_a_reply_that_nobody_should_average_is_dropped_with_its_reason(change, reason):
    replies, messages = replies_to(lambda content: None, change, lambda content: None)
    sound, dropped = screen(replies, messages)
    assert [reply.metadata.src_node_id for reply in sound] == [1, 3]
    assert dropped == {1: reason}


def test_a_client_that_does_not_answer_and_one_that_answers_twice():
    replies, messages = replies_to(*[lambda content: None] * 3)
    sound, dropped = screen([replies[0], replies[0], replies[2]], messages)
    assert sound == [replies[0], replies[2]]
    assert dropped == {1: "no reply came"}


def test_a_large_finite_sum_is_no_fault():
    huge = put("arrays", record_of(w=torch.full((2,), 3e38)))
    replies, messages = replies_to(huge)
    assert screen(replies, messages)[1] == {}


def test_a_client_goes_on_from_the_round_it_is_told(tmp_path):
    states = ClientStates(tmp_path)
    assert states.load(7, 0) == {}
    for number, told in ((1, 0), (4, 1), (6, 1), (8, 6)):  # what it sent in round 4 was not used
        states.save(7, number, {"c": torch.full((2,), float(number))}, keep=told)
    # Round 8 may be run again after a crash, or its reply not be used.
    assert [states.load(7, number)["c"][0] for number in (6, 8)] == [6, 8]
    assert sorted(path.name for path in (tmp_path / "7").iterdir()) == ["round-6.safetensors", "round-8.safetensors"]


def test_a_round_that_ends_late_leaves_the_newer_ones(tmp_path):
    states = ClientStates(tmp_path)
    for number in (1, 3, 2):
        states.save(0, number, {"c": torch.ones(1)}, keep=1)
    assert states.rounds(0) == [1, 2, 3]


def test_a_client_state_that_is_gone_is_said(tmp_path):
    with pytest.raises(LowrankError, match=r"what client 2 kept from round 5 is gone: there is no .*round-5.safe"):
        ClientStates(tmp_path).load(2, 5)


def test_a_damaged_client_state_is_said(tmp_path):
    states = ClientStates(tmp_path)
    states.save(2, 1, {"c": torch.ones(2)}, keep=0)
    (tmp_path / "2" / "round-1.safetensors").write_bytes(b"short")
    with pytest.raises(LowrankError, match=r"the state of client 2 in .*round-1.safetensors cannot be read"):
        states.load(2, 1)
