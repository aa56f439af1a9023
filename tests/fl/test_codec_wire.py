"""Codecs between a Flower strategy and its clients: a plain ClientApp with our mod, and our own clients."""

import dataclasses
import itertools

import flwr.app
import numpy as np
import pytest
from cases import equal_parts, how, small_examples, small_model
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from lowrank_core import factorize
from lowrank_fl.codecs import HALF, INDICES, LEVELS, SCALES, VALUES, Undecodable
from lowrank_fl.config import CodecConfig, FederationConfig, StrategyConfig
from lowrank_fl.flower.codecs import codec_mod
from lowrank_fl.flower.grid import LocalGrid, make_context
from lowrank_fl.flower.records import to_arrays, to_record
from lowrank_fl.flower.rounds import Server, measure_round
from lowrank_fl.flower.screening import screen
from lowrank_fl.flower.strategies import make_strategy
from lowrank_fl.flower.wire import Wire
from lowrank_fl.flower.workers import InProcess, Workers
from lowrank_fl.state import trained_names, transferred

LOSSY = ("fp16", "int8", "topk")
CODECS = ("none", *LOSSY)
SEED = 7  # of cases.how


def config(up="none", down="none", top_k=0.25) -> CodecConfig:
    return CodecConfig.model_validate({"up": up, "down": down, "top_k": top_k})


class Flower:
    """Some Flower app's clients, which add `change` to the model and remember what they received."""

    def __init__(self, codec: CodecConfig, folder=None, clients=3):
        self.app = ClientApp(mods=[codec_mod(codec, SEED, folder)])
        self.received: dict[int, dict[str, np.ndarray]] = {}
        self.change: dict[str, np.ndarray] | float = 0.0
        self.grid = LocalGrid(clients, self._run, shared=False)
        self.wire = Wire(codec, SEED)
        self.clients = clients

        @self.app.train()
        def train(message, context):
            client = context.node_config["partition-id"]
            arrays = {name: array.copy() for name, array in to_arrays(message.content.array_records["arrays"]).items()}
            self.received[client] = arrays
            trained = {
                name: value + (self.change[name] if isinstance(self.change, dict) else self.change)
                for name, value in arrays.items()
            }
            record = flwr.app.ArrayRecord({name: flwr.app.Array(value) for name, value in trained.items()})
            metrics = MetricRecord({"num-examples": 1, "loss": 0.0})
            return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)

        @self.app.evaluate()
        def evaluate(message, context):
            self.received[context.node_config["partition-id"]] = to_arrays(message.content.array_records["arrays"])
            return Message(RecordDict({"metrics": MetricRecord({"loss": 0.0})}), reply_to=message)

    def _run(self, messages):
        return [self.app(m, make_context(m.metadata.dst_node_id - 1, self.clients)) for m in messages]

    def round(self, number, arrays, clients=(0, 1, 2), kind="train"):
        record = to_record(arrays, shared=False)
        config = ConfigRecord({"server-round": number})
        messages = [Message(RecordDict({"arrays": record, "config": config}), c + 1, kind) for c in clients]
        exchange = self.wire.exchange(self.grid, messages)
        if kind == "train":
            self.wire.accept(number, screen(exchange.replies, exchange.messages)[0])
        return exchange


def model(seed=0, size=200):
    rng = np.random.default_rng(seed)
    return {"w": rng.normal(size=(size, 3)).astype(np.float32), "b": rng.normal(size=5).astype(np.float32)}


def close(arrays, others, atol):
    for name, array in arrays.items():
        np.testing.assert_allclose(array, others[name], atol=atol, rtol=0)


def test_a_flower_app_sees_plain_arrays_and_the_server_its_model_with_the_change():
    start, change = model(0), model(1)
    app = Flower(config("fp16", "fp16"))
    app.change = change
    exchange = app.round(1, start)
    for name, values in app.received[1].items():
        np.testing.assert_array_equal(values, start[name].astype(np.float16).astype(np.float32))
    for reply in exchange.replies:
        for name, values in to_arrays(reply.content.array_records["arrays"]).items():
            # The client computes its change from what it received, in float32.
            received = app.received[0][name]
            travelled = ((received + change[name]) - received).astype(np.float16).astype(np.float32)
            np.testing.assert_array_equal(values, start[name] + travelled)
    assert screen(exchange.replies, exchange.messages) == (exchange.replies, {})


@pytest.mark.parametrize(("up", "down"), [pair for pair in itertools.product(CODECS, CODECS) if pair != ("none",) * 2])
def test_the_servers_model_is_not_hurt_by_what_the_downlink_loses(tmp_path, up, down):
    start = model()
    app = Flower(config(up, down, top_k=1.0), tmp_path)
    app.change = 0.25  # on which every codec is exact, but for the float32 difference
    replies = app.round(1, start).replies
    for reply in replies:
        arrays = to_arrays(reply.content.array_records["arrays"])
        close(arrays, {name: value + 0.25 for name, value in start.items()}, atol=3e-3 if up == "int8" else 2e-6)


def test_eight_bits_are_drawn_anew_for_each_client_and_round_and_each_round_of_the_downlink():
    start = model()
    app = Flower(config("int8", "int8"))
    app.change = model(3)
    drawn = []
    for number in (1, 2, 1):
        replies = app.round(number, start).replies
        drawn.append([to_arrays(r.content.array_records["arrays"])["w"] for r in replies] + [app.received[0]["w"]])
    first, second, again = drawn
    assert np.array_equal(app.received[0]["w"], app.received[2]["w"])
    for one, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, same)
    for one, other in [(first[0], first[1]), (first[0], second[0]), (first[3], second[3])]:
        assert not np.array_equal(one, other)


def test_clients_test_the_model_that_they_train_next():
    app = Flower(config(down="int8"))
    app.round(3, model(), kind="evaluate")
    tested = app.received[0]["w"]
    app.round(4, model())
    np.testing.assert_array_equal(app.received[0]["w"], tested)


def test_what_the_largest_entries_leave_out_is_sent_later(tmp_path):
    app = Flower(config("topk", top_k=0.5), tmp_path, clients=1)
    start = {"w": np.zeros(4, np.float32)}
    app.change = {"w": np.array([8, 4, 3, 1], np.float32)}
    sums = np.zeros(4)
    for number, expected in [(1, [8, 4, 0, 0]), (2, [8, 0, 6, 0]), (3, [8, 8, 0, 0]), (4, [8, 0, 6, 0])]:
        before = app.wire.state()
        (reply,) = app.round(number, start, clients=[0]).replies
        sent = to_arrays(reply.content.array_records["arrays"])["w"]
        np.testing.assert_array_equal(sent, expected)
        sums += sent
    np.testing.assert_array_equal(sums, [32, 12, 12, 0])
    # A round that is run again sends what it sent before.
    app.wire.load_state(before)
    (reply,) = app.round(4, start, clients=[0]).replies
    np.testing.assert_array_equal(to_arrays(reply.content.array_records["arrays"])["w"], [8, 0, 6, 0])


@pytest.mark.slow
def test_error_feedback_reaches_what_larger_changes_hide(tmp_path):
    """Two clients' largest changes cancel for ever; what they agree on is smaller, and needs error feedback."""
    changes = [{"w": np.array([10, 1], np.float32)}, {"w": np.array([-10, 1], np.float32)}]
    reached = {}
    for folder in (tmp_path, None):
        weights = np.zeros(2, np.float32)
        apps = [Flower(config("topk", top_k=0.5), folder and folder / str(n), clients=1) for n in range(2)]
        for number in range(1, 41):
            sent = []
            for app, app.change in zip(apps, changes, strict=True):
                (reply,) = app.round(number, {"w": weights}, [0]).replies
                sent.append(to_arrays(reply.content.array_records["arrays"])["w"])
            weights = np.mean(sent, axis=0)
        reached[folder] = weights.tolist()
    assert reached[None] == [0, 0]
    assert reached[tmp_path][0] == 0
    assert reached[tmp_path][1] >= 40 - 20  # all that was asked for, less what is still on its way


def test_without_a_folder_what_is_left_out_is_lost():
    app = Flower(config("topk", top_k=0.5), clients=1)
    app.change = {"w": np.array([8, 4, 3, 1], np.float32)}
    for number in (1, 2):
        (reply,) = app.round(number, {"w": np.zeros(4, np.float32)}, clients=[0]).replies
        np.testing.assert_array_equal(to_arrays(reply.content.array_records["arrays"])["w"], [8, 4, 0, 0])


def shadowed(models, top_k):
    """What clients hold after each model: written out with sorting."""
    held, history = models[0].copy(), []
    for now in models:
        difference = now - held
        order = np.argsort(-np.abs(difference), kind="stable")[: round(top_k * len(now))]
        if history:
            held[order] = now[order]
        history.append(held.copy())
    return history


@pytest.mark.parametrize("resumed", [False, True])
def test_a_client_that_was_away_gets_what_it_missed(tmp_path, resumed):
    rng = np.random.default_rng(2)
    models = np.cumsum(rng.normal(size=(9, 2000)), axis=0).astype(np.float32)
    expected = shadowed(models, 0.1)
    app = Flower(config(down="topk", top_k=0.1), tmp_path)
    parts = [(0, 1), (0,), (0, 2), (0,), (1,), (0, 1), (0,), (2,), (0, 1, 2)]
    sizes = []
    for number, clients in enumerate(parts, 1):
        if resumed:
            before = app.wire.state()
            app.round(number, {"w": models[number - 1]}, clients)  # cut short, and run again from its start
            app = Flower(config(down="topk", top_k=0.1), tmp_path)
            app.wire.load_state(before)
        exchange = app.round(number, {"w": models[number - 1]}, clients)
        assert not any(reply.has_error() for reply in exchange.replies)
        sizes.append(exchange.downlink_bytes)
        for client in clients:
            np.testing.assert_array_equal(app.received[client]["w"], expected[number - 1])
    assert sizes[1] < 0.4 * sizes[0] / 2


def test_testing_changes_nothing_of_the_training_and_is_not_sent_twice(tmp_path):
    models = np.cumsum(np.random.default_rng(4).normal(size=(5, 3000)), axis=0).astype(np.float32)
    plain, tested = (Flower(config(down="topk", top_k=0.1), tmp_path / name) for name in ("plain", "tested"))
    for number in range(1, 5):
        plain.round(number, {"w": models[number - 1]}, (0, number % 3))
        trained = tested.round(number, {"w": models[number - 1]}, (0, number % 3))
        np.testing.assert_array_equal(plain.received[0]["w"], tested.received[0]["w"])
        evaluated = tested.round(number, {"w": models[number]}, kind="evaluate")
        if number > 1:  # by then every client has been sent everything once
            assert trained.downlink_bytes < 2 * 2000
            assert 3 * 2400 < evaluated.downlink_bytes < 3 * (2400 + 2000)


def test_a_client_that_failed_or_never_answered_is_sent_what_it_missed(tmp_path):
    models = np.cumsum(np.random.default_rng(2).normal(size=(4, 40)), axis=0).astype(np.float32)
    expected = shadowed(models, 0.1)
    app = Flower(config(down="topk", top_k=0.1), tmp_path)
    app.round(1, {"w": models[0]})
    answer = app.grid._execute
    app.grid._execute = lambda messages: answer(messages[:1])  # the others' messages are lost
    app.round(2, {"w": models[1]})
    app.grid._execute = answer
    app.round(3, {"w": models[2]})
    for client in range(3):
        np.testing.assert_array_equal(app.received[client]["w"], expected[2])


def test_a_client_that_lost_what_it_held_says_so(tmp_path):
    app = Flower(config(down="topk"), clients=1)
    app.round(1, model(), [0])
    with pytest.raises(Undecodable, match="the client no longer has what it received before"):
        app.round(2, model(1), [0])


TOTAL = 605
GARBAGE = [
    ("fp16", {"w": np.ones((200, 3), np.float32)}, "does not decode as fp16 (codec.up): codec/half is missing"),
    ("fp16", {HALF: np.ones(10**6, np.float16)}, "codec/half is float16 (1000000,), not float16 (605,)"),
    ("fp16", {HALF: np.full(TOTAL, np.nan, np.float16)}, "arrays holds numbers that are not finite"),
    ("int8", {LEVELS: np.ones(TOTAL, np.int8), SCALES: np.ones(3, np.float32)}, "codec/scales is float32 (3,)"),
    ("int8", {LEVELS: np.ones(TOTAL, np.int8), SCALES: np.full(2, np.inf, np.float32)}, "are not finite"),
    ("topk", {INDICES: np.arange(151, dtype=np.int32) + 600, VALUES: np.ones(151, np.float32)}, "from 0 to 604"),
    ("topk", {INDICES: np.arange(99, dtype=np.int32), VALUES: np.ones(99, np.float32)}, "99 entries came where 151"),
    ("none", {"w": np.ones(3, np.float32), "b": np.ones(5, np.float32)}, "arrays/w is float32 (3,)"),
]


@pytest.mark.parametrize(("up", "sent", "reason"), GARBAGE)
def test_garbage_drops_the_client_that_sent_it(tmp_path, up, sent, reason):
    app = Flower(config(up, "fp16"), tmp_path)
    answer = app.grid._execute

    def execute(messages):
        replies = answer(messages)
        record = flwr.app.ArrayRecord({name: flwr.app.Array(values) for name, values in sent.items()})
        replies[1].content = RecordDict({**replies[1].content, "arrays": record})
        return replies

    app.grid._execute = execute
    exchange = app.round(1, model())
    sound, dropped = screen(exchange.replies, exchange.messages)
    assert [reply.metadata.src_node_id for reply in sound] == [1, 3]
    assert list(dropped) == [1]
    assert reason in dropped[1]


@pytest.mark.parametrize("up", CODECS)
def test_bytes_that_are_no_array_drop_the_client(tmp_path, up):
    app = Flower(config(up, "fp16"), tmp_path)
    answer = app.grid._execute

    def execute(messages):
        replies = answer(messages)
        (name, array), *_ = replies[0].content.array_records["arrays"].items()
        broken = flwr.app.Array(array.dtype, tuple(array.shape), "numpy.ndarray", b"\x93NUMPY nonsense")
        replies[0].content.array_records["arrays"][name] = broken
        return replies

    app.grid._execute = execute
    exchange = app.round(1, model())
    _, dropped = screen(exchange.replies, exchange.messages)
    assert list(dropped) == [0]
    assert "cannot be read" in dropped[0]


@pytest.mark.parametrize(("up", "share"), [("fp16", 1 / 2), ("int8", 1 / 4), ("topk", 0.1 * 8 / 4)])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_bytes_of_a_large_model(tmp_path, up, share, direction):
    start = model(size=50_000)

    def measured(name):
        app = Flower(config(**{direction: name}, top_k=0.1), tmp_path / name)
        app.round(1, start)
        exchange = app.round(2, start)
        return exchange.uplink_bytes if direction == "up" else exchange.downlink_bytes

    assert measured(up) == pytest.approx(share * measured("none"), rel=0.02)


@pytest.fixture(scope="module")
def workers():
    pool = Workers(2)
    yield pool
    pool.close()


def federate(executor, folder, codec, strategy="fedavg", rounds=2):
    """Bytes, losses and the final model of a small federation of our own clients."""
    examples = small_examples()
    net = small_model()
    factorize(net, "fedpara", rank=2)
    local = dataclasses.replace(how(lr=0.05), state_folder=folder, codec=codec)
    executor.set_up(net, examples, equal_parts(examples, 4), local)
    grid = LocalGrid(4, executor.execute, shared=executor.shared)
    made = make_strategy(StrategyConfig(name=strategy), local.federation, trained_names(net))
    initial = to_record(transferred(net), shared=executor.shared)
    found = []
    for trained in Server(made, grid, local.federation, Wire(codec, SEED), 5).rounds(initial, rounds):
        bits = {name: array.tobytes() for name, array in to_arrays(trained.arrays).items()}
        found.append((trained.uplink_bytes, trained.downlink_bytes, trained.train_loss, bits))
    return found


PAIRS = [("fp16", "int8"), ("int8", "topk"), ("topk", "fp16"), ("topk", "topk")]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "fedadam", "feddyn"])
def test_every_codec_works_with_every_strategy_and_any_number_of_workers(tmp_path, workers, strategy):
    for up, down in PAIRS:
        codec = config(up, down)
        alone = federate(InProcess(), tmp_path / f"{up}-{down}-1", codec, strategy)
        assert federate(workers, tmp_path / f"{up}-{down}-2", codec, strategy) == alone


@pytest.mark.parametrize(("up", "down"), list(itertools.product(CODECS, CODECS)))
def test_a_plan_measures_the_bytes_a_round_really_takes(tmp_path, up, down):
    codec = config(up, down)
    rounds = 2 if down == "topk" else 1
    net, wire = small_model(), Wire(codec)
    federation = FederationConfig.model_validate({**how().federation.model_dump(), "clients_per_round": 4})
    for number in range(1, rounds + 1):
        plan = measure_round(
            StrategyConfig(name="scaffold"), federation, transferred(net), trained_names(net), wire, number
        )
    app = InProcess()
    app.set_up(net, small_examples(), equal_parts(small_examples(), 4), _with(federation, codec, tmp_path))
    grid = LocalGrid(4, app.execute, shared=False)
    made = make_strategy(StrategyConfig(name="scaffold"), federation, trained_names(net))
    initial = to_record(transferred(net), shared=False)
    *_, last = Server(made, grid, federation, Wire(codec, SEED), 5).rounds(initial, rounds)
    assert plan == (last.downlink_bytes, last.uplink_bytes)


def _with(federation, codec, folder):
    return dataclasses.replace(how(), federation=federation, state_folder=folder, codec=codec)


def test_no_codec_costs_no_mod(tmp_path):
    executor = InProcess()
    federate(executor, tmp_path, config(), rounds=1)
    assert executor._resident.app._mods == []
    federate(executor, tmp_path, config("fp16"), rounds=1)
    assert len(executor._resident.app._mods) == 1


def test_a_message_that_nobody_can_decode():
    app = Flower(config(down="fp16"), clients=1)
    content = RecordDict({"config": ConfigRecord({"server-round": 1}), "codec": ConfigRecord({"down": "zip"})})
    message = Message(content, 1, "train")
    with pytest.raises(Undecodable, match="encoded as 'zip', version None, which nobody knows"):
        app.app(message, make_context(0, 1))
