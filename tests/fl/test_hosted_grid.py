"""Clients over nodes that host several of them: a Flower grid that is only made up."""

import time
from collections.abc import Callable

import httpx
import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from lowrank_core import LowrankError
from lowrank_fl.config import RunConfig
from lowrank_fl.flower import remote
from lowrank_fl.flower.engines import hosted
from lowrank_fl.flower.engines.hosted import HostedGrid
from lowrank_fl.flower.grid import LocalGrid
from lowrank_fl.flower.screening import screen


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    LocalGrid(1, lambda messages: [], shared=False)  # lets this process make messages
    monkeypatch.setattr(hosted, "_INTERVAL", 0.01)


class FakeGrid(Grid):
    """Nodes by id, each with its node configuration; the app answers at once, but for what `silent` says."""

    def __init__(self, nodes: dict[int, dict[str, int | str]], app: ClientApp) -> None:
        self.nodes, self.app = nodes, app
        self.silent: Callable[[Message], bool] = lambda message: False
        self.sent: list[Message] = []
        self._replies: dict[str, Message] = {}

    def set_run(self, run): ...

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *arguments, **more):
        raise NotImplementedError

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            ids.append(f"message-{len(self.sent)}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            self.sent.append(message)
            node = message.metadata.dst_node_id
            context = Context(1, node, self.nodes[node], RecordDict(), {})
            if not self.silent(message):
                self._replies[ids[-1]] = self.app(message, context)
        return ids

    def pull_messages(self, message_ids):
        found = [self._replies.pop(name) for name in message_ids if name in self._replies]
        return found[::-1]  # whatever order they come in

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError


def echo() -> ClientApp:
    """Answers which client the message named, and on which node."""
    app = remote.make_remote_app(lambda message, context: pytest.fail("trains"))
    told = ClientApp()

    @told.query()
    def query(message: Message, context: Context) -> Message:
        return app(message, context)

    @told.train()
    def train(message: Message, context: Context) -> Message:
        config = message.content.config_records["config"]
        if config["client"] == 3:
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "no examples"), reply_to=message)
        known = ConfigRecord({**config, "node": context.node_id, "hosts": context.node_config["partition-id"]})
        return Message(RecordDict({"config": known}), reply_to=message)

    return told


def parts(*ids: int, of: int) -> dict[int, dict[str, int | str]]:
    """Nodes with ids such as Flower draws, each with one of `of` parts."""
    return {7_000_000_000 + 13 * part: {"partition-id": part, "num-partitions": of} for part in ids}


def open_grid(grid: FakeGrid, clients: int = 5, patience: float = 0.05, **more) -> HostedGrid:
    return HostedGrid(grid, clients, **{"timeout": None, "patience": patience, "extra": {}, **more})


def messages_for(*clients: int) -> list[Message]:
    return [
        Message(RecordDict({"config": ConfigRecord({"client": client})}), client + 1, "train", group_id="4")
        for client in clients
    ]


def test_each_client_is_asked_on_the_node_of_its_part_and_answers_in_order():
    grid = FakeGrid(parts(1, 0, of=2), echo())
    clients = open_grid(grid)
    assert list(clients.get_node_ids()) == [1, 2, 3, 4, 5]
    replies = clients.send_and_receive(messages_for(4, 1, 0))
    assert [reply.metadata.src_node_id for reply in replies] == [1, 2, 5]
    told = [reply.content.config_records["config"] for reply in replies]
    assert [each["client"] for each in told] == [0, 1, 4]
    assert [each["hosts"] for each in told] == [0, 1, 0]
    assert [message.metadata.group_id for message in grid.sent[2:]] == ["4"] * 3


def test_extra_values_reach_the_client_and_leave_the_callers_message_alone():
    clients = open_grid(FakeGrid(parts(0, of=1), echo()), extra={"run": 6})
    [message] = messages_for(2)
    [reply] = clients.send_and_receive([message])
    assert reply.content.config_records["config"]["run"] == 6
    assert dict(message.content.config_records["config"]) == {"client": 2}


def test_an_error_reply_is_its_clients_own():
    clients = open_grid(FakeGrid(parts(0, 1, of=2), echo()))
    sent = messages_for(3, 2)
    replies = clients.send_and_receive(sent)
    assert [reply.metadata.src_node_id for reply in replies] == [3, 4]
    assert replies[1].error.reason == "no examples"
    assert screen(replies, sent)[1][3] == "no examples"


@pytest.mark.slow
def test_a_client_that_never_answers_is_left_out_after_the_timeout():
    grid = FakeGrid(parts(0, 1, of=2), echo())
    grid.silent = lambda message: message.content.config_records.get("config", {}).get("client") == 1
    clients = open_grid(grid, timeout=0.2)
    sent = messages_for(0, 1, 2)
    began = time.monotonic()
    replies = clients.send_and_receive(sent)
    assert 0.2 <= time.monotonic() - began < 5
    assert [reply.metadata.src_node_id for reply in replies] == [1, 3]
    assert screen(replies, sent)[1][1] == "no reply came"
    assert grid.sent[-1].metadata.ttl == 0.2


def test_a_node_that_comes_back_under_another_id_takes_its_part_again():
    grid = FakeGrid(parts(0, 1, of=2), echo())
    clients = open_grid(grid)
    gone = next(iter(grid.nodes))
    grid.nodes = {99: grid.nodes[gone], **{node: said for node, said in grid.nodes.items() if node != gone}}
    assert [r.content.config_records["config"]["node"] for r in clients.send_and_receive(messages_for(0, 2))] == [
        99,
        99,
    ]


def test_clients_of_a_node_that_is_gone_are_left_out():
    grid = FakeGrid(parts(0, 1, of=2), echo())
    clients = open_grid(grid)
    del grid.nodes[next(iter(grid.nodes))]
    assert [reply.metadata.src_node_id for reply in clients.send_and_receive(messages_for(0, 1))] == [2]


def test_a_node_that_is_gone_costs_no_round_any_time(monkeypatch):
    grid = FakeGrid(parts(0, 1, of=2), echo())
    clients = open_grid(grid, patience=60)
    del grid.nodes[next(iter(grid.nodes))]
    monkeypatch.setattr(hosted.time, "sleep", lambda seconds: pytest.fail("waits"))
    for _ in range(2):
        assert [reply.metadata.src_node_id for reply in clients.send_and_receive(messages_for(0, 1))] == [2]


@pytest.mark.slow
def test_a_node_that_comes_back_has_the_time_to_say_its_part_once(monkeypatch):
    """A SuperNode takes seconds for an answer; one that never gives it costs a single round."""
    grid = FakeGrid(parts(0, 1, of=2), echo())
    clients = open_grid(grid, patience=0.3)
    gone = next(iter(grid.nodes))
    grid.nodes[99] = grid.nodes.pop(gone)
    late = iter(range(100))
    pull = grid.pull_messages
    monkeypatch.setattr(grid, "pull_messages", lambda ids: pull(ids) if next(late) > 2 else [])
    assert [reply.metadata.src_node_id for reply in clients.send_and_receive(messages_for(0, 1))] == [1, 2]
    grid.nodes[100] = grid.nodes.pop(99)
    grid.silent = lambda message: message.metadata.message_type == "query"
    waits: list[float] = []
    sleep = time.sleep
    monkeypatch.setattr(hosted.time, "sleep", lambda seconds: (waits.append(seconds), sleep(seconds)))
    assert len(clients.send_and_receive(messages_for(0, 1))) == 1
    assert waits
    waits.clear()
    assert len(clients.send_and_receive(messages_for(0, 1))) == 1
    assert not waits


@pytest.mark.parametrize(
    ("status", "raised", "said"),
    [(403, KeyboardInterrupt, None), (500, LowrankError, "the SuperLink fails .*see its own log")],
)
def test_a_stopped_run_and_a_failing_superlink_are_told_apart(monkeypatch, status, raised, said):
    grid = FakeGrid(parts(0, of=1), echo())
    clients = open_grid(grid)

    def refuse(message_ids):
        request = httpx.Request("POST", "http://127.0.0.1/pull")
        raise httpx.HTTPStatusError(f"status {status}", request=request, response=httpx.Response(status))

    monkeypatch.setattr(grid, "pull_messages", refuse)
    with pytest.raises(raised, match=said):
        clients.send_and_receive(messages_for(0))


def test_nodes_that_come_late_are_waited_for(monkeypatch):
    grid = FakeGrid(parts(0, of=2), echo())
    looked = iter(range(100))

    def come_at_the_third_look():
        if next(looked) == 2:
            grid.nodes |= parts(1, of=2)
        return list(grid.nodes)

    monkeypatch.setattr(grid, "get_node_ids", come_at_the_third_look)
    assert len(open_grid(grid, patience=5).send_and_receive(messages_for(0, 1))) == 2


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ({}, r"no SuperNode has come after 0.05 s; start it, or wait longer: -o engine.wait_for_nodes=S"),
        (parts(1, of=3), "no SuperNode has come with partition-id 0, 2 of 3 after 0.05 s; start it"),
        (
            {5: {"partition-id": 0, "num-partitions": 2}, 6: {"partition-id": 0, "num-partitions": 2}},
            r"two SuperNodes host partition-id 0 \(5 and 6\); give each a number of its own in its --node-config",
        ),
        (
            {5: {"partition-id": 0, "num-partitions": 2}, 6: {"partition-id": 1, "num-partitions": 3}},
            r"the SuperNodes disagree on num-partitions \(2, 3\); start them all with the same number",
        ),
        ({5: {}}, "SuperNode 5 has partition-id None of num-partitions None; start it with --node-config"),
        ({5: {"partition-id": 2, "num-partitions": 2}}, "SuperNode 5 has partition-id 2 of num-partitions 2; start"),
        ({5: {"partition-id": "a", "num-partitions": 2}}, "SuperNode 5 has partition-id a of num-partitions 2; start"),
    ],
)
def test_what_is_wrong_with_the_nodes_is_said(nodes, said):
    with pytest.raises(LowrankError, match=said):
        open_grid(FakeGrid(nodes, echo()))


def test_a_node_that_cannot_load_the_app_is_named():
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(Error(ErrorCode.LOAD_CLIENT_APP_EXCEPTION, "no module lowrank_fl"), reply_to=message)

    with pytest.raises(LowrankError, match="SuperNode 5 cannot run clients: no module lowrank_fl"):
        open_grid(FakeGrid({5: {"partition-id": 0, "num-partitions": 1}}, app))


def test_a_node_without_the_data_answers_with_an_error(tmp_path):
    config = RunConfig.model_validate({"data": {"name": "cinic10", "path": str(tmp_path / "none")}})
    app = remote.make_remote_app(lambda *_: remote.resident_of(config.model_dump_json(), tmp_path))
    clients = open_grid(FakeGrid(parts(0, of=1), app))
    [reply] = clients.send_and_receive(messages_for(0))
    assert str(tmp_path / "none") in reply.error.reason
