"""Replies that anyone may have sent, and clients that fail: dropped with their reason, never averaged, no crash."""

import flwr.app
import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict
from test_run import Watcher, rows_of

from lowrank_core import LowrankError
from lowrank_fl.config import CodecConfig, FederationConfig, StrategyConfig
from lowrank_fl.flower.evaluation import evaluate_by_clients
from lowrank_fl.flower.grid import LocalGrid, client_of
from lowrank_fl.flower.records import to_arrays, to_record
from lowrank_fl.flower.rounds import Server
from lowrank_fl.flower.strategies import make_strategy
from lowrank_fl.flower.wire import Wire
from lowrank_fl.load import load_config
from lowrank_fl.run import Interrupted, run
from lowrank_fl.training import Trainer

SHAPE = (3, 4)


def federation(tolerated: float = 0.5) -> FederationConfig:
    return FederationConfig(clients=4, clients_per_round=4, tolerated_failures=tolerated)


def sent(values: float = 2.0, **declared: object) -> flwr.app.ArrayRecord:
    array = flwr.app.Array(np.full(SHAPE, values, np.float32))
    told = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, **declared}
    return flwr.app.ArrayRecord({"w": flwr.app.Array(**told, data=array.data)})


def grid_of(*hostile: int, usual: MetricRecord, change=lambda content: None, arrays: bool = True) -> LocalGrid:
    """Four clients; what the hostile ones send is changed."""

    def answer(message: Message) -> Message:
        content = RecordDict({"metrics": MetricRecord(dict(usual))})
        if arrays:
            content["arrays"] = sent()
        if client_of(message.metadata.dst_node_id) in hostile:
            change(content)
        return Message(content, reply_to=message)

    return LocalGrid(4, lambda messages: [answer(message) for message in messages], shared=False)


TRAINED = MetricRecord({"num-examples": 5, "loss": 0.5})


def one_round(*hostile: int, change, config=None, tolerated=0.5, codec=None):
    grid = grid_of(*hostile, usual=TRAINED, change=change)
    strategy = make_strategy(config or StrategyConfig(), federation(tolerated), ["w"])
    start = to_record({"w": np.ones(SHAPE, np.float32)}, shared=False)
    (trained,) = Server(strategy, grid, federation(tolerated), Wire(codec), 0, [5] * 4).rounds(start, 1)
    return trained


def put(key, record):
    def change(content):
        content[key] = record

    return change


def metrics(**values):
    named = {name.replace("_", "-"): value for name, value in values.items()}
    return put("metrics", MetricRecord(named))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (metrics(num_examples=float("inf"), loss=0.5), "it reports inf examples"),
        (metrics(num_examples=1e300, loss=0.5), "it reports 1e+300 examples"),
        (metrics(num_examples=0, loss=0.5), "it reports 0 examples"),
        (metrics(num_examples=10**18, loss=0.5), f"it reports {10**18} examples, and has 5"),
        (metrics(num_examples=5, loss=float("nan")), "it reports the loss nan"),
        (metrics(num_examples=5, loss=[1.0, 2.0]), "it reports the loss [1.0, 2.0]"),
        (metrics(num_examples=5), "it reports num-examples instead of loss, num-examples"),
        (
            metrics(num_examples=5, loss=0.5, more=1.0),
            "it reports loss, more, num-examples instead of loss, num-examples",
        ),
        (put("bonus", MetricRecord({"x": 1})), "it sent the metric records metrics, bonus instead of metrics"),
        (lambda content: content.pop("metrics"), "it sent the metric records none instead of metrics"),
        (put("arrays", sent(shape=(10**12,))), f"arrays/w is float32 ({10**12},), not float32 (3, 4)"),
        (put("arrays", sent(dtype="evil")), "arrays/w is evil (3, 4), not float32 (3, 4)"),
    ],
)
def test_a_reply_that_would_break_or_own_the_average_drops_its_client(change, reason):
    trained = one_round(1, change=change)
    assert trained.dropped == {1: reason}
    np.testing.assert_array_equal(to_arrays(trained.arrays)["w"], np.full(SHAPE, 2, np.float32))
    assert trained.train_loss == 0.5


@pytest.mark.parametrize("up", ["fp16", "int8", "topk"])
def test_an_encoded_reply_with_an_absurd_shape_drops_its_client(up):
    absurd = put("arrays", sent(shape=(10**12,)))
    good = FederationConfig(clients=4, clients_per_round=4, tolerated_failures=1.0)
    grid = grid_of(0, 1, 2, 3, usual=TRAINED, change=absurd)
    strategy = make_strategy(StrategyConfig(), good, ["w"])
    start = to_record({"w": np.ones(SHAPE, np.float32)}, shared=False)
    with pytest.raises(LowrankError, match=r"no client can be used in round 1; client 0: its reply does not decode"):
        list(Server(strategy, grid, good, Wire(CodecConfig(up=up)), 0).rounds(start, 1))


def test_a_dropped_reply_counts_by_what_came():
    whole = one_round(change=None).uplink_bytes
    absurd = one_round(1, change=put("arrays", sent(shape=(10**12,)))).uplink_bytes
    assert abs(absurd - whole) < 20


def test_more_failures_than_tolerated_end_the_run():
    change = metrics(num_examples=0, loss=0.5)
    with pytest.raises(LowrankError) as caught:
        one_round(1, 2, 3, change=change)
    assert str(caught.value) == (
        "client 1 (and 2 more) cannot be used in round 1: it reports 0 examples; "
        "raise federation.tolerated_failures to go on without such clients"
    )
    with pytest.raises(LowrankError) as caught:
        one_round(0, 1, 2, 3, change=change, tolerated=1.0)
    assert str(caught.value) == "no client can be used in round 1; client 0: it reports 0 examples"


def test_a_long_reason_is_cut():
    trained = one_round(1, change=put("x" * 10_000, MetricRecord({"x": 1})))
    assert len(trained.dropped[1]) < 320


def test_a_server_step_beyond_all_numbers_is_refused():
    config = StrategyConfig(name="fedavgm", server_lr=1e38, server_momentum=0.9)
    far = put("arrays", sent(values=1e3))
    with pytest.raises(LowrankError) as caught:
        one_round(0, 1, 2, 3, change=far, config=config)
    assert str(caught.value) == (
        "the server's step in round 1 leaves numbers that are not finite, though every reply's are; "
        "lower strategy.server_lr or federation.lr"
    )


TESTED = {"num-examples": 5, "accuracy": 0.75, "loss": 0.5}


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"accuracy": 1.5}, "it reports the accuracy 1.5"),
        ({"accuracy": -0.5}, "it reports the accuracy -0.5"),
        ({"accuracy": float("nan")}, "it reports the accuracy nan"),
        ({"accuracy": [0.5]}, "it reports the accuracy [0.5]"),
        ({"loss": float("inf")}, "it reports the loss inf"),
        ({"num-examples": -1}, "it reports -1 examples"),
        ({"more": 1}, "it reports accuracy, loss, more, num-examples instead of accuracy, loss, num-examples"),
    ],
)
def test_a_test_result_that_is_none_drops_its_client(wrong, reason):
    usual, broken = MetricRecord(TESTED), MetricRecord({**TESTED, **wrong})
    grid = grid_of(2, usual=usual, change=put("metrics", broken), arrays=False)
    strategy = make_strategy(StrategyConfig(), federation(), [])
    start = to_record({"w": np.ones(SHAPE, np.float32)}, shared=False)
    found = evaluate_by_clients(strategy, grid, start, federation(), Wire(), 1)
    assert found.dropped == {2: reason}
    assert found.client_accuracies == [0.75, 0.75, None, 0.75]
    assert (found.accuracy, found.loss) == (0.75, 0.5)


def broken_run(tmp_path, monkeypatch, error: BaseException, *more: str):
    train = Trainer.train

    def broken(self, client, *arguments, **options):
        if client == 1:
            raise error
        return train(self, client, *arguments, **options)

    monkeypatch.setattr(Trainer, "train", broken)
    monkeypatch.setattr("lowrank_fl.one_run.write_report", lambda out, summaries: None)
    small = ["rounds=1", "federation.clients=3", "federation.clients_per_round=3", "federation.epochs=1"]
    small += ["model.method=fedpara", "model.width=4", "data.max_examples=60", "engine.workers=1", *more]
    return run(load_config("quickstart", small), tmp_path / "run", Watcher())


def test_whatever_a_client_raises_is_that_clients_failure(tmp_path, monkeypatch):
    full = OSError(28, "No space left on device")
    broken_run(tmp_path, monkeypatch, full, "federation.tolerated_failures=0.5")
    assert rows_of(tmp_path / "run")[0]["dropped"] == {"1": "OSError: [Errno 28] No space left on device"}


def test_a_client_that_fails_ends_the_run_where_that_is_not_tolerated(tmp_path, monkeypatch):
    with pytest.raises(LowrankError, match=r"client 1 cannot be used in round 1: MemoryError: 7 TiB; raise"):
        broken_run(tmp_path, monkeypatch, MemoryError("7 TiB"))


def test_ctrl_c_is_no_clients_failure(tmp_path, monkeypatch):
    with pytest.raises(Interrupted):
        broken_run(tmp_path, monkeypatch, KeyboardInterrupt(), "federation.tolerated_failures=0.5")
