"""A client whose reply the server does not use goes on as if it had not been asked; one that lost its state says so."""

import dataclasses
import shutil

import flwr.app
import numpy as np
import pytest
from cases import equal_parts, how, small_examples, small_model
from flwr.app import ConfigRecord, Message, RecordDict
from safetensors.numpy import load_file

from lowrank_core import LowrankError, factorize
from lowrank_fl.config import CodecConfig, StrategyConfig
from lowrank_fl.data.examples import Parts
from lowrank_fl.flower.evaluation import evaluate_by_clients
from lowrank_fl.flower.grid import LocalGrid, make_context
from lowrank_fl.flower.instructions import Instructions
from lowrank_fl.flower.records import to_arrays, to_record
from lowrank_fl.flower.rounds import Server
from lowrank_fl.flower.strategies import load_strategy_state, make_strategy, strategy_state
from lowrank_fl.flower.wire import Wire
from lowrank_fl.flower.workers import InProcess
from lowrank_fl.state import Personalization, trained_names, transferred

CLIENTS, ROUNDS = 4, 6
UNUSED = {(2, 0), (2, 1), (3, 1), (4, 2), (5, 0), (5, 3)}
"""Rounds and clients whose replies do not reach the average."""


class Federation:
    """Rounds of our own clients, of which `treat(round, message, answer)` gives the reply; None is none."""

    def __init__(self, folder, treat, strategy="fedavg", codec=None, method="fedpara", kind="none", sampled=3):
        examples, self.model = small_examples(), small_model()
        factorize(self.model, method, rank=2)
        codec = codec or CodecConfig()
        personal = Personalization(kind, "1", 1, 0.5)
        plain = how(clients=CLIENTS, clients_per_round=sampled, epochs=1, tolerated_failures=0.7)
        local = dataclasses.replace(plain, state_folder=folder, codec=codec, personalization=personal)
        train = equal_parts(examples, CLIENTS).train
        self.folder, self.treat, self.federation = folder, treat, local.federation
        self.executor = InProcess()
        self.executor.set_up(self.model, examples, Parts([p[:-3] for p in train], [p[-3:] for p in train]), local)
        self.grid = LocalGrid(CLIENTS, self._execute, shared=False)
        self.wire, self.start = Wire(codec, 7), to_record(transferred(self.model, personal), shared=False)
        names = trained_names(self.model, personal)
        self.strategy = make_strategy(StrategyConfig(name=strategy), self.federation, names)

    def _execute(self, messages):
        replies = []
        for message in messages:
            number = message.content.config_records["config"]["server-round"]
            if message.metadata.message_type == "evaluate":
                replies += self.executor.execute([message])
            elif reply := self.treat(number, message, lambda asked: self.executor.execute([asked])[0]):
                replies.append(reply)
        return replies

    def rounds(self, count=ROUNDS, first=1):
        server = Server(self.strategy, self.grid, self.federation, self.wire, 5)
        yield from server.rounds(self.start, count, first)

    def bits(self, trained):
        """Of what a round came to, tests by clients included."""
        tested = evaluate_by_clients(
            self.strategy, self.grid, trained.arrays, self.federation, self.wire, trained.number
        )
        arrays = {name: array.tobytes() for name, array in to_arrays(trained.arrays).items()}
        return arrays, trained.downlink_bytes, trained.dropped, tested.client_accuracies, tested.loss

    def kept(self, kind, client):
        """What the client goes on from."""
        number = dict(self.wire.state()["accepted"].tolist()).get(client, 0)
        return load_file(self.folder / kind / str(client) / f"round-{number}.safetensors") if number else {}


def client_of(message):
    return message.metadata.dst_node_id - 1


def thrown_away(number, message, answer):
    reply = answer(message)
    return None if (number, client_of(message)) in UNUSED else reply


def never_asked(number, message, answer):
    return None if (number, client_of(message)) in UNUSED else answer(message)


def refused(number, message, answer):
    reply = answer(message)
    if (number, client_of(message)) in UNUSED:
        arrays = to_arrays(reply.content.array_records["arrays"])
        broken = {n: values * np.nan if values.dtype.kind == "f" else values for n, values in arrays.items()}
        record = flwr.app.ArrayRecord({name: flwr.app.Array(values) for name, values in broken.items()})
        reply.content = RecordDict({**reply.content, "arrays": record})
    return reply


CASES = {
    "scaffold": {"strategy": "scaffold"},
    "feddyn": {"strategy": "feddyn"},
    "pfedpara": {"method": "pfedpara", "kind": "pfedpara"},
    "ditto": {"kind": "ditto"},
    "topk": {"codec": CodecConfig(up="topk", down="topk", top_k=0.2), "strategy": "scaffold"},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_reply_that_is_thrown_away_leaves_everything_as_if_it_had_not_been_asked_for(case, tmp_path):
    results = []
    for treat in (thrown_away, never_asked):
        federation = Federation(tmp_path / treat.__name__, treat, **CASES[case])
        found = [federation.bits(trained) for trained in federation.rounds()]
        kept = {
            (kind.name, client, name): array.tobytes()
            for kind in (tmp_path / treat.__name__).iterdir()
            if kind.name != "received"
            for client in range(CLIENTS)
            for name, array in federation.kept(kind.name, client).items()
        }
        assert any(dropped for _, _, dropped, *_ in found)
        results.append((found, kept))
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_round_with_dropped_clients_ends_the_same_when_it_is_run_again(case, tmp_path):
    """All that clients do in a round is done, and nothing of it has reached the checkpoint."""
    federation, found, again = Federation(tmp_path, thrown_away, **CASES[case]), [], []
    for trained in federation.rounds(1):
        found.append(federation.bits(trained))
        start = trained.arrays
    for number in range(2, ROUNDS + 1):
        wire, strategy = federation.wire.state(), strategy_state(federation.strategy)
        for results in (found, again):
            federation = Federation(tmp_path, thrown_away, **CASES[case])
            federation.start = start
            federation.wire.load_state(wire)
            load_strategy_state(federation.strategy, strategy, start)
            (trained,) = federation.rounds(number, first=number)
            results.append(federation.bits(trained))
        start = trained.arrays
    assert again == found[1:]
    assert any(dropped for _, _, dropped, *_ in found)


@pytest.mark.slow
def test_a_client_that_was_late_before_a_crash_has_what_the_resumed_run_counts_on(tmp_path):
    """After the lost answer the client is sent the whole model to test, and must keep what it held before."""
    late, case = {(2, 1)}, CASES["topk"]

    def treat(number, message, answer):
        reply = answer(message)
        return None if (number, client_of(message)) in late else reply

    federation = Federation(tmp_path, treat, **case, sampled=CLIENTS)
    (trained,) = federation.rounds(1)
    federation.bits(trained)
    start, wire, strategy = trained.arrays, federation.wire.state(), strategy_state(federation.strategy)
    for expected in ([1], []):
        federation = Federation(tmp_path, treat, **case, sampled=CLIENTS)
        federation.start = start
        federation.wire.load_state(wire)
        load_strategy_state(federation.strategy, strategy, start)
        (trained,) = federation.rounds(2, first=2)
        federation.bits(trained)
        assert list(trained.dropped) == expected
        late.clear()


@pytest.mark.slow
@pytest.mark.parametrize("treat", [thrown_away, refused])
def test_scaffolds_control_variate_stays_the_mean_of_the_clients(treat, tmp_path):
    federation, dropped = Federation(tmp_path, treat, strategy="scaffold"), 0
    for trained in federation.rounds():
        dropped += len(trained.dropped)
        own = [federation.kept("strategy", client) for client in range(CLIENTS)]
        for name, values in federation.strategy.control.items():
            mean = sum(c.get(name, np.zeros_like(values)) for c in own) / CLIENTS
            np.testing.assert_allclose(values, mean, rtol=0, atol=1e-6)
            assert np.abs(values).max() > 1e-3
    assert dropped >= 3


@pytest.mark.slow
@pytest.mark.parametrize("treat", [thrown_away, refused])
def test_what_topk_sent_and_what_it_left_out_is_everything(treat, tmp_path):
    """Of what a client trained, the part that the server used and the residual are all that the server's rounds saw."""
    used, changes = {}, {}

    def watched(number, message, answer):
        received = to_arrays(message.content.array_records["arrays"])
        reply = treat(number, message, answer)
        if (number, client_of(message)) not in UNUSED:
            client, record = client_of(message), to_arrays(reply.content.array_records["arrays"])
            sent = np.zeros(total)
            sent[record["codec/indices"]] = record["codec/values"]
            used[client] = used.get(client, 0) + sent
            trained = federation.executor._resident.trainer.shared
            change = [(trained[name].detach().numpy() - values).ravel() for name, values in received.items()]
            changes[client] = changes.get(client, 0) + np.concatenate(change)
        return reply

    federation = Federation(tmp_path, watched, codec=CodecConfig(up="topk", top_k=0.2))
    total = sum(tensor.numel() for tensor in transferred(federation.model).values())
    for _ in federation.rounds():
        for client, change in changes.items():
            residual = federation.kept("residual", client)["arrays"]
            np.testing.assert_allclose(used[client] + residual, change, rtol=0, atol=1e-5)
    assert len(changes) == CLIENTS


@pytest.mark.parametrize(
    ("case", "kind"), [("scaffold", "strategy"), ("feddyn", "strategy"), ("pfedpara", "personal"), ("topk", "residual")]
)
def test_a_client_that_lost_its_state_is_dropped_and_said(case, kind, tmp_path):
    federation = Federation(tmp_path, lambda number, message, answer: answer(message), **CASES[case], sampled=CLIENTS)
    dropped = []
    for trained in federation.rounds(3):
        dropped.append(trained.dropped)
        if trained.number == 1:
            shutil.rmtree(tmp_path / kind / "1")
    assert dropped[0] == {}
    for found in dropped[1:]:
        assert list(found) == [1]
        assert f"what client 1 kept from round 1 is gone: there is no {tmp_path / kind / '1'}" in found[1]


def test_a_client_that_lost_the_model_it_held_is_sent_all_of_it(tmp_path):
    codec = CodecConfig(down="topk", top_k=0.05)
    federation = Federation(tmp_path, lambda number, message, answer: answer(message), codec=codec, sampled=CLIENTS)
    dropped, sizes = [], []
    for trained in federation.rounds(4):
        dropped.append(list(trained.dropped))
        sizes.append(trained.downlink_bytes)
        if trained.number == 1:
            shutil.rmtree(tmp_path / "received" / "1")
    assert dropped == [[], [1], [], []]
    assert sizes[1] < sizes[2] < sizes[0]
    assert abs(sizes[3] - sizes[1]) < 20


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, "server-round None"),
        ({"server-round": "first"}, "server-round 'first'"),
        ({"server-round": 1, "state-round": -1}, "state-round -1"),
        ({"server-round": 1, "client": 0.5}, r"client 0\.5"),
        ({"server-round": 1, "lr": "high"}, "lr 'high'"),
    ],
)
def test_a_message_that_no_client_understands(config, reason, tmp_path):
    message = Message(RecordDict({"config": ConfigRecord(config)}), 1, "train")
    with pytest.raises(LowrankError, match=f"the message's config has {reason}, which is no usable number; let a Wire"):
        Instructions.of(message, make_context(0, 1)).number("lr")
