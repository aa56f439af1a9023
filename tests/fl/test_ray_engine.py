"""Flower's Ray backend, stood in for: what is made of its answers and failures."""

import logging
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
from cases import equal_parts, how, small_examples, small_model
from flwr.app import ConfigRecord, Message, RecordDict

from lowrank_core import LowrankError
from lowrank_fl.flower.engines import ray as ray_engine
from lowrank_fl.flower.engines.ray import RayEngine
from lowrank_fl.flower.screening import screen
from lowrank_fl.load import load_config

pytest.importorskip("ray")


class Actor:
    """Answers a message by `behave`, in a thread of its own."""

    def __init__(self, behave) -> None:
        self.behave = behave
        self.killed = threading.Event()
        self.run = self

    def remote(self, app, message, client, context):
        future = Future()
        threading.Thread(target=self._answer, args=(future, message, context), daemon=True).start()
        return self, future

    def _answer(self, future, message, context) -> None:
        try:
            self.behave(context.node_config["partition-id"])
            reply = Message(RecordDict({"config": ConfigRecord(dict(context.node_config))}), reply_to=message)
            future.set_result((context.node_id, reply, context))
        except Exception as error:
            future.set_exception(error)


class Pool:
    def __init__(self, behave) -> None:
        self.made = 0
        self.behave = behave
        self.pool = [self.create_actor_fn() for _ in range(2)]

    def create_actor_fn(self) -> Actor:
        self.made += 1
        return Actor(self.behave)


class Backend:
    """Two actors, and room for another where one is killed."""

    num_workers = 2
    app_fn = None
    ended = False

    def __init__(self, behave) -> None:
        self.pool = Pool(behave)

    def terminate(self) -> None:
        self.ended = True


def get(asked, timeout=None):
    """As `ray.get`: a result, its error, that of a killed actor, or that of a time that is over."""
    from ray.exceptions import GetTimeoutError, RayActorError

    actor, future = asked
    deadline = None if timeout is None else time.monotonic() + timeout
    while not future.done():
        if actor.killed.is_set():
            raise RayActorError
        if deadline is not None and time.monotonic() > deadline:
            raise GetTimeoutError
        time.sleep(0.01)
    return future.result()


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch):
    monkeypatch.setattr("ray.get", get)
    monkeypatch.setattr("ray.kill", lambda actor: actor.killed.set())


@pytest.fixture
def make(monkeypatch, tmp_path):
    """`make(behave)` is an engine over actors that answer by `behave`, its backend and a grid of four clients."""

    def make(behave, **engine: float):
        backend = Backend(behave)
        monkeypatch.setattr(ray_engine, "_start", lambda config, workers: backend)
        settings = [f"engine.{key}={value}" for key, value in engine.items()]
        config = load_config("quickstart", ["engine.kind=ray", "federation.clients=4", *FEWER, *settings])
        examples = small_examples()
        ours = RayEngine(config, 2)
        training = how()
        training = type(training)(**{**vars(training), "state_folder": tmp_path})
        return ours, backend, ours.set_up(config, small_model(), examples, equal_parts(examples, 4), training)

    return make


@pytest.fixture
def send(make):
    """`send(behave, *clients)` is what a round with these clients comes to."""

    def send(behave, *clients: int, **engine: float):
        ours, backend, grid = make(behave, **engine)
        try:
            messages = messages_for(*clients)
            return messages, list(grid.send_and_receive(messages))
        finally:
            ours.close(at_once=True)
            assert backend.ended

    return send


def messages_for(*clients: int) -> list[Message]:
    return [Message(RecordDict({"config": ConfigRecord()}), client + 1, "train") for client in clients]


FEWER = ["federation.clients_per_round=3"]


@pytest.mark.slow
def test_replies_come_in_the_order_of_the_clients(send):
    _, replies = send(lambda client: time.sleep(0.05 * (3 - client)), 2, 0, 1)
    assert [reply.metadata.src_node_id for reply in replies] == [1, 2, 3]
    assert [reply.content.config_records["config"]["partition-id"] for reply in replies] == [0, 1, 2]


@pytest.mark.slow
def test_a_client_that_never_answers_is_left_out_after_the_timeout(send):
    messages, replies = send(lambda client: time.sleep(1.0 if client == 0 else 0), 0, 1, timeout=0.3)
    assert [reply.metadata.src_node_id for reply in replies] == [2]
    assert screen(replies, messages)[1][0] == "no reply came"


def test_an_exception_in_an_actor_is_that_clients_error(send):
    from ray.exceptions import RayTaskError

    def behave(client):
        if client == 1:
            raise RayTaskError("run", "Traceback", ValueError("no such layer"))

    _, replies = send(behave, 0, 1)
    assert replies[1].error.reason == "ValueError: no such layer"
    assert not replies[0].has_error()


def test_an_actor_that_dies_is_that_clients_error_and_is_replaced(make):
    from ray.exceptions import RayActorError

    def behave(client):
        if client == 0:
            raise RayActorError

    ours, backend, grid = make(behave)
    sent = messages_for(0, 1)
    dead, sound = grid.send_and_receive(sent)
    assert dead.error.reason.startswith("its Ray actor died, most likely for lack of memory; try -o engine.workers=1")
    assert not sound.has_error()
    assert (len(backend.pool.pool), backend.pool.made) == (2, 3)
    ours.close()


@pytest.mark.slow
def test_a_client_that_never_answers_costs_its_round_alone_and_no_time_at_the_end(make):
    never = threading.Event()
    ours, backend, grid = make(lambda client: never.wait(60) if client == 0 else None, timeout=0.3)
    assert [reply.metadata.src_node_id for reply in grid.send_and_receive(messages_for(0, 1))] == [2]
    assert (len(backend.pool.pool), backend.pool.made) == (2, 3)
    assert len(grid.send_and_receive(messages_for(1, 2, 3))) == 3
    began = time.monotonic()
    ours.close()
    assert time.monotonic() - began < 10
    assert backend.ended
    never.set()


def test_closing_does_not_wait_for_a_client_that_is_training(make):
    """As after Ctrl-C, where nothing else ends the round."""
    training, never = threading.Event(), threading.Event()

    def behave(client):
        training.set()
        never.wait(60)

    ours, backend, grid = make(behave)
    answers = []
    waiting = threading.Thread(target=lambda: answers.extend(grid.send_and_receive(messages_for(0))), daemon=True)
    waiting.start()
    assert training.wait(10)
    began = time.monotonic()
    ours.close(at_once=True)
    assert time.monotonic() - began < 10
    assert backend.ended
    assert backend.pool.made == 2  # an actor made now would start Ray anew
    waiting.join(10)
    never.set()


def test_flowers_logger_is_left_as_it_was(send):
    level = logging.getLogger("flwr").level
    send(lambda client: None, 0)
    assert logging.getLogger("flwr").level == level


@pytest.mark.slow
def test_a_backend_that_does_not_start_is_quoted(monkeypatch):
    from flwr.server.superlink.fleet.vce.backend import raybackend

    def fail(config):
        raise ConnectionError("no cluster\nthere")

    monkeypatch.setattr(raybackend, "RayBackend", fail)
    config = load_config("quickstart", ["engine.kind=ray"])
    with pytest.raises(LowrankError, match=r"Ray does not start \(no cluster there\); try -o engine.kind=local"):
        RayEngine(config, 2)


@pytest.mark.parametrize(
    ("address", "device", "cpus", "gpus"), [(None, "cpu", 6, 0), (None, "cuda", 6, 0.5), ("auto", "cpu", None, 0)]
)
def test_the_cluster_is_made_for_the_workers_or_taken_as_it_is(monkeypatch, address, device, cpus, gpus):
    from flwr.server.superlink.fleet.vce.backend import raybackend

    asked = []

    class Taken(Backend):
        def __init__(self, config) -> None:
            super().__init__(None)
            asked.append(config)

        def build(self, app) -> None: ...

    monkeypatch.setattr(raybackend, "RayBackend", Taken)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    RayEngine(load_config("quickstart", ["engine.kind=ray", "engine.threads=3", f"device={device}"]), 2).close()
    assert asked[0]["init_args"].get("num_cpus") == cpus
    assert asked[0]["client_resources"] == {"num_cpus": 3, "num_gpus": gpus}


def test_what_travels_to_an_actor_is_light(tmp_path):
    """The app goes with every message: a configuration and a path, no model and no data."""
    import ray.cloudpickle

    app = ray_engine.partial(ray_engine._client_app, load_config("quickstart").model_dump_json(), Path(tmp_path))
    assert len(ray.cloudpickle.dumps(app)) < 5_000
