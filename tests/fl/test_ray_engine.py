"""Flower's Ray backend, stood in for: what is made of its answers and failures."""

import logging
import time
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


class Backend:
    """Answers a message by `behave`."""

    num_workers = 2
    app_fn = None
    ended = False

    def __init__(self, behave) -> None:
        self.behave = behave

    def process_message(self, message, context):
        self.behave(context.node_config["partition-id"])
        return Message(RecordDict({"config": ConfigRecord(dict(context.node_config))}), reply_to=message), context

    def terminate(self) -> None:
        self.ended = True


@pytest.fixture
def send(monkeypatch, tmp_path):
    """`send(behave, *clients)` is what a round with these clients comes to."""

    def send(behave, *clients: int, **engine: float):
        backend = Backend(behave)
        monkeypatch.setattr(ray_engine, "_start", lambda config, workers: backend)
        settings = [f"engine.{key}={value}" for key, value in engine.items()]
        config = load_config("quickstart", ["engine.kind=ray", "federation.clients=4", *FEWER, *settings])
        examples = small_examples()
        ours = RayEngine(config, 2)
        try:
            training = how()
            training = type(training)(**{**vars(training), "state_folder": tmp_path})
            grid = ours.set_up(config, small_model(), examples, equal_parts(examples, 4), training)
            messages = [Message(RecordDict({"config": ConfigRecord()}), client + 1, "train") for client in clients]
            return messages, list(grid.send_and_receive(messages))
        finally:
            ours.close(at_once=True)
            assert backend.ended

    return send


FEWER = ["federation.clients_per_round=3"]


def test_replies_come_in_the_order_of_the_clients(send):
    _, replies = send(lambda client: time.sleep(0.05 * (3 - client)), 2, 0, 1)
    assert [reply.metadata.src_node_id for reply in replies] == [1, 2, 3]
    assert [reply.content.config_records["config"]["partition-id"] for reply in replies] == [0, 1, 2]


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


def test_an_actor_that_dies_ends_the_run(send):
    from ray.exceptions import RayActorError

    def behave(client):
        raise RayActorError

    with pytest.raises(
        LowrankError, match=r"a Ray actor died, most likely for lack of memory; try fewer with -o engine"
    ):
        send(behave, 0)


def test_flowers_logger_is_left_as_it_was(send):
    level = logging.getLogger("flwr").level
    send(lambda client: None, 0)
    assert logging.getLogger("flwr").level == level


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
