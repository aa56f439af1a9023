"""Updates as factors (FedMUD): what they compose to, what travels, and who holds which weights."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import kill_before_checkpoint, one_more_trial, small_examples
from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_run import Watcher, rows_of

from lowrank_core import LowrankError, UsageError
from lowrank_fl.clients import examples_of, model_of
from lowrank_fl.config import EngineConfig, FailuresConfig, FederationConfig, ModelConfig, StrategyConfig, UpdateConfig
from lowrank_fl.data.examples import Parts
from lowrank_fl.flower import rounds as rounds_module
from lowrank_fl.flower.base_model import DENSE, HELD, MISSED, BaseModel
from lowrank_fl.flower.grid import LocalGrid
from lowrank_fl.flower.held_weights import HeldWeights
from lowrank_fl.flower.instructions import Instructions
from lowrank_fl.flower.records import to_arrays, to_record
from lowrank_fl.flower.rounds import Server
from lowrank_fl.flower.strategies import make_strategy
from lowrank_fl.flower.wire import Wire
from lowrank_fl.flower.workers import InProcess, Workers
from lowrank_fl.infer import load_classifier
from lowrank_fl.load import load_config
from lowrank_fl.models.build import build_model
from lowrank_fl.plan import plan
from lowrank_fl.run import resume, run
from lowrank_fl.state import trained_names, transferred
from lowrank_fl.training import LocalTraining, Trainer
from lowrank_fl.updates.forms import PRODUCTS, KroneckerProduct, LowRankProduct, UpdateForm
from lowrank_fl.updates.layers import put_updates

pytestmark = pytest.mark.usefixtures("quick")

KINDS = ["low-rank", "kronecker"]
SMALL = [
    "rounds=3",
    "federation.clients=5",
    "federation.clients_per_round=2",
    "federation.epochs=1",
    "model.method=original",
    "model.width=8",
    "update.ratio=0.1",
    "data.max_examples=120",
    "data.max_test_examples=40",
    "partition.kind=iid",
    "engine.workers=1",
]


def config(*more: str, kind: str = "low-rank"):
    return load_config("quickstart", [*SMALL, f"update.kind={kind}", *more])


# What factors compose to.


@pytest.mark.parametrize("shape", [(6, 10), (5, 3, 3, 3), (8, 4, 1, 1)])
def test_a_kronecker_change_is_the_blocks_one_after_the_other(shape):
    product = KroneckerProduct(shape, 0.5)
    u, v = torch.randn(2, *product.sides["u"]).unbind()
    blocks = [torch.kron(one, other).flatten() for one, other in zip(u, v, strict=True)]
    assert len(blocks) == math.ceil(0.5**2 * math.prod(shape) / 4)
    expected = torch.cat(blocks)[: math.prod(shape)].reshape(shape)
    torch.testing.assert_close(product.compose(u, v), expected, rtol=0, atol=0)


def test_a_low_rank_change_of_a_kernel_is_a_matrix_of_its_numbers_in_their_order():
    product = LowRankProduct((4, 2, 3, 3), 0.3)
    u, v = torch.randn(12, product.rank), torch.randn(6, product.rank)
    expected = torch.einsum("ar,br->ab", u, v).flatten()
    torch.testing.assert_close(product.compose(u, v).flatten(), expected)
    assert product.sides == {"u": tuple(u.shape), "v": tuple(v.shape)}


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    kernel=st.sampled_from([(), (1, 1), (3, 3), (5, 5)]),
    ratio=st.floats(0.01, 0.99),
)
def test_factors_hold_the_share_of_the_numbers_that_is_asked_for(rows, columns, kernel, ratio):
    """r = ⌈ratio·mn / (m + n)⌉ for m x n, and blocks that cover the mn numbers with about 2·sqrt(k·mn)."""
    shape = (rows, columns, *kernel)
    total = math.prod(shape)
    for aware in (False, True):
        low_rank = UpdateForm(LowRankProduct(shape, ratio), aware, 1.0)
        m, n = low_rank.product.matrix
        assert m * n == total
        assert ratio * total <= low_rank.size * (1 + 1e-9) < ratio * total + m + n + 1e-6
        kronecker = UpdateForm(KroneckerProduct(shape, ratio), aware, 1.0)
        k, z = kronecker.product.rank, kronecker.product.side
        assert k * (z - 1) ** 4 < total <= k * z**4
        assert kronecker.size == 2 * k * z * z
        # z is rounded up from (mn / k)^(1/4), and k from ratio² mn / 4.
        exact = 2 * math.sqrt(k * total)
        assert exact >= ratio * total * (1 - 1e-9)
        assert exact * (1 - 1e-9) <= kronecker.size <= exact * (1 + 1 / (total / k) ** 0.25) ** 2 * (1 + 1e-9)


def test_the_papers_ratio_is_met_on_a_layer_where_nothing_is_rounded():
    assert LowRankProduct((256, 256), 1 / 32).sides == {"u": (256, 4), "v": (256, 4)}
    product = KroneckerProduct((256, 256), 1 / 32)
    assert (product.rank, product.side) == (16, 8)
    assert UpdateForm(product, True, 1.0).size == 256 * 256 / 32


@settings(max_examples=30)
@given(kind=st.sampled_from(KINDS), clients=st.integers(1, 6), seed=st.integers(0, 1000))
def test_the_mean_of_aware_factors_composes_to_the_mean_of_changes(kind, clients, seed):
    form = UpdateForm(PRODUCTS[kind]((7, 5, 3, 3), 0.3), True, 2.0)
    fixed = {name: value.double() for name, value in form.draw(seed).items() if name in form.fixed}
    generator = torch.Generator().manual_seed(seed)
    trained = [
        {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in form.trained.items()}
        for _ in range(clients)
    ]
    shares = torch.rand(clients, generator=generator, dtype=torch.float64).softmax(0)
    mean = {name: sum(p * own[name] for p, own in zip(shares, trained, strict=True)) for name in form.trained}
    expected = sum(p * form.compose(own | fixed) for p, own in zip(shares, trained, strict=True))
    torch.testing.assert_close(form.compose(mean | fixed), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_of_other_factors_does_not(kind):
    form = UpdateForm(PRODUCTS[kind]((7, 5, 3, 3), 0.3), False, 2.0)
    one, two = ({name: torch.randn(shape) for name, shape in form.trained.items()} for _ in range(2))
    mean = {name: (one[name] + two[name]) / 2 for name in one}
    gap = form.compose(mean) - (form.compose(one) + form.compose(two)) / 2
    assert gap.norm() > 0.1 * form.compose(one).norm()


@pytest.mark.parametrize("aware", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_begins_at_zero_and_factors_differ_by_seed(kind, aware):
    form = UpdateForm(PRODUCTS[kind]((6, 8), 0.3), aware, 0.5)
    drawn = form.draw(3)
    assert not form.compose(drawn).any()
    random = [name for name, value in drawn.items() if value.any()]
    assert random == (["fixed_u", "fixed_v"] if aware else ["u"])
    for name in random:
        assert drawn[name].abs().max() <= 0.5
        assert torch.equal(drawn[name], form.draw(3)[name])
        assert not torch.equal(drawn[name], form.draw(4)[name])


# What a network becomes.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", ["cnn", "resnet18"])
def test_every_layer_between_the_ends_has_an_update_and_nothing_has_changed_yet(network, kind):
    plain, _ = build_model(ModelConfig(name=network, method="original", width=8), (1, 16, 16), 5, seed=0)
    model = copy.deepcopy(plain)
    report = put_updates(model, network, UpdateConfig(kind=kind), seed=0)
    layers = [n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    assert [entry.name for entry in report.changed] == layers[1:-1]
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"{name}.weight" for name in layers[1:-1]}
    factors = {f"{name}.update.{side}" for name in layers[1:-1] for side in "uv"}
    assert model.state_dict().keys() == plain.state_dict().keys() | factors
    assert report.params == report.original_params == sum(p.numel() for p in plain.parameters())
    inputs = torch.randn(3, 1, 16, 16)
    torch.testing.assert_close(model.eval()(inputs), plain.eval()(inputs), rtol=0, atol=1e-6)


def test_a_layer_that_its_factors_would_not_make_smaller_stays_and_is_said(tmp_path):
    watcher = Watcher()
    run(config("update.ratio=0.9", "rounds=1", "update.whole_ends=false"), tmp_path / "run", watcher)
    # 8 x 1 x 3 x 3: ⌈0.9 · 72 / (24 + 3)⌉ = 3 columns of 27 numbers.
    assert watcher.notes[0] == (
        "features.0 stays as it is: the factors of its update would hold 81 numbers, no fewer than it"
    )


# A round.

SEED, LR = 7, 0.05


def mlp(update: UpdateConfig):
    model, _ = build_model(ModelConfig(name="mlp", method="original", width=8), (1, 8, 8), 3, seed=1)
    put_updates(model, "mlp", update, seed=SEED)
    return model


def federate(
    folder, update, executor=None, *, strategy=None, rounds=1, clients=1, sampled=None, batch=60, fail=None, **trials
):
    """The server's weights, everything merged, after each round, and who trained."""
    executor = executor or InProcess()
    examples, model = small_examples(), mlp(update)
    values = {"clients": clients, "clients_per_round": sampled or clients, "epochs": 1, "batch_size": batch, "lr": LR}
    federation = FederationConfig.model_validate({**values, "tolerated_failures": 0.5 if fail else 0.0})
    parts = Parts([np.arange(client, 60, clients) for client in range(clients)], [])
    base = BaseModel.of(model, update.interval)
    executor.set_up(model, examples, parts, LocalTraining(federation, 0.0, SEED, "cpu", 1, folder, update=update))
    grid = LocalGrid(clients, executor.execute, shared=executor.shared)
    if fail:
        fail(grid)
    arrays = to_record(transferred(model), shared=executor.shared)
    trials |= {"examples": [len(rows) for rows in parts.train]}
    made = make_strategy(strategy or StrategyConfig(), federation, trained_names(model))
    for trained in Server(made, grid, federation, Wire(base=base), SEED, **trials).rounds(arrays, rounds):
        yield base.whole(to_arrays(trained.arrays)), trained


@pytest.mark.parametrize("aware", [True, False])
def test_a_step_moves_a_weight_by_its_gradient_through_what_is_random(aware, tmp_path):
    """W - lr (G V Vᵀ + U Uᵀ G) with the fixed U and V, or W - lr U Uᵀ G, G being the dense network's gradient."""
    update = UpdateConfig(kind="low-rank", aware=aware, ratio=0.3, scale=0.4, whole_ends=False)
    examples, model = small_examples(), mlp(update)
    names = ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    start = [model.state_dict()[name].double().requires_grad_() for name in names]
    hidden = F.linear(examples.normalize(examples.inputs).flatten(1).double(), start[0], start[1]).relu()
    gradients = torch.autograd.grad(F.cross_entropy(F.linear(hidden, start[2], start[3]), examples.labels), start)
    ((after, _),) = federate(tmp_path, update)
    for name, before, g in zip(names, start, gradients, strict=True):
        if name.endswith("weight"):
            drawn = dict(model.get_submodule(name.replace("weight", "update")).start(0))
            u = drawn["fixed_u" if aware else "u"].double()
            moved = u @ u.T @ g
            if aware:
                v = drawn["fixed_v"].double()
                moved += g @ v @ v.T
            g = moved
        np.testing.assert_allclose(after[name], (before - LR * g).detach().numpy(), rtol=0, atol=2e-6)
        assert g.abs().max() > 1e-3


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox"])
@pytest.mark.parametrize("kind", KINDS)
def test_fedprox_draws_the_factors_to_where_they_began(kind, strategy, tmp_path):
    update = UpdateConfig(kind=kind, ratio=0.3, whole_ends=False)
    rule = StrategyConfig.model_validate({"name": strategy, "mu": 15.0})
    moved = []
    for number, one in enumerate((StrategyConfig(), rule)):
        ((after, _),) = federate(tmp_path / str(number), update, strategy=one, batch=10)
        moved.append(np.linalg.norm(after["fc1.weight"] - mlp(update).fc1.weight.detach().numpy()))
    assert (moved[1] < 0.8 * moved[0]) == (strategy == "fedprox")


# Who holds which weights.


class Spied:
    """What clients are sent beside `arrays`, and that each of them comes to the server's bits."""

    def __init__(self, monkeypatch) -> None:
        self.servers: dict[int, dict[str, np.ndarray]] = {}
        self.sent: list[tuple[int, int, str]] = []
        add_to, received = BaseModel.add_to, HeldWeights.received

        def adding(base, messages):
            self.servers[base.period] = {name: weight.copy() for name, weight in base.weights.items()}
            self.begins = base.updates.begins(base.finished)
            add_to(base, messages)

        def receiving(held, content, told, finished):
            arrays = received(held, content, told, finished)
            updates = held._updates
            period = updates.period(finished)
            for name, weight in updates.weights.items():
                assert weight.numpy().tobytes() == self.servers[period][name].tobytes()
            given = next((key for key in (MISSED, DENSE) if key in content.array_records), "")
            self.sent.append((told.client, period - int(told.number(HELD)), given))
            return arrays

        monkeypatch.setattr(BaseModel, "add_to", adding)
        monkeypatch.setattr(HeldWeights, "received", receiving)


@pytest.mark.slow
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_client_that_was_away_comes_to_the_servers_bits(kind, interval, tmp_path, monkeypatch):
    spied = Spied(monkeypatch)
    update = UpdateConfig(kind=kind, ratio=0.3, scale=0.4, interval=interval, whole_ends=False)
    ends = list(federate(tmp_path, update, rounds=24, clients=8, sampled=1, batch=3))
    assert len(spied.sent) == 24
    assert len(spied.servers) == 24 // interval
    assert not np.array_equal(ends[0][0]["fc1.weight"], ends[-1][0]["fc1.weight"])
    by_gap = {given: {gap for _, gap, found in spied.sent if found == given} for given in (MISSED, DENSE, "")}
    assert min(by_gap[MISSED]) >= 1
    assert max(by_gap[""]) <= 1
    # What 3 sets of factors say, of about 0.3 of the weights each, 1 dense set says as shortly; one set is in `arrays`.
    assert min(by_gap[DENSE]) >= 3
    assert max(by_gap[MISSED]) <= 4
    assert max(by_gap[DENSE]) > min(by_gap[DENSE])


def test_a_client_whose_reply_was_lost_comes_to_the_servers_bits(tmp_path, monkeypatch):
    spied = Spied(monkeypatch)

    def losing(grid):
        send = grid.send_and_receive
        rounds = iter(range(100))

        def lossy(messages, **options):
            replies = send(messages, **options)
            return replies[1:] if next(rounds) % 2 else replies

        grid.send_and_receive = lossy

    update = UpdateConfig(kind="kronecker", ratio=0.2, whole_ends=False)
    ends = list(federate(tmp_path, update, rounds=8, clients=3, sampled=2, batch=6, fail=losing))
    assert [sorted(trained.dropped.values()) for _, trained in ends] == 4 * [[], ["no reply came"]]
    lost = [min(trained.clients) for _, trained in ends[1::2]]
    after = [gap for client, gap, _ in spied.sent if client in lost]
    assert max(after) > 2


@pytest.mark.parametrize("interval", [1, 2])
def test_a_round_in_which_nobody_trains_leaves_the_model_as_it_was(interval, tmp_path, monkeypatch):
    spied = Spied(monkeypatch)
    drops = iter([False, True, True, False, True, False])
    simulate = rounds_module.simulate

    def simulated(failures, *rest):
        return simulate(FailuresConfig(dropout=float(next(drops))), *rest)

    monkeypatch.setattr(rounds_module, "simulate", simulated)
    update = UpdateConfig(kind="low-rank", ratio=0.2, interval=interval, whole_ends=False)
    ends = list(federate(tmp_path, update, rounds=6, clients=2, batch=6, failures=FailuresConfig(dropout=0.5)))
    moved = [not np.array_equal(a["fc1.weight"], b["fc1.weight"]) for (a, _), (b, _) in itertools.pairwise(ends)]
    assert moved == [False, False, True, False, True]
    assert len(spied.sent) == 6


def test_weights_that_are_gone_are_named_and_the_server_is_told(tmp_path):
    update = UpdateConfig(kind="low-rank", ratio=0.2, whole_ends=False)
    rounds = federate(tmp_path, update, rounds=3, clients=1)
    next(rounds), next(rounds)
    file = tmp_path / "weights" / "0" / "round-1.safetensors"
    file.unlink()
    with pytest.raises(LowrankError, match=r"what client 0 kept from round 1 is gone: there is no .*round-1"):
        next(rounds)


def test_a_message_that_does_not_lead_to_the_rounds_weights_is_refused(tmp_path):
    update = UpdateConfig(kind="low-rank", ratio=0.2, whole_ends=False)
    model, examples = mlp(update), small_examples()
    federation = FederationConfig(clients=1, clients_per_round=1)
    how = LocalTraining(federation, 0.0, SEED, "cpu", 1, tmp_path, update=update)
    held = HeldWeights(Trainer(model, examples, Parts([np.arange(60)], []), how))
    content = RecordDict({"arrays": to_record(transferred(model), shared=False)})
    with pytest.raises(LowrankError) as caught:
        held.received(content, Instructions(0, 3, 0, None, {}), 2)
    assert str(caught.value) == (
        "the message brings the factors of 1 periods to a client that holds the weights of period 0, and the round is "
        "of period 2; let a Wire with the run's BaseModel send it"
    )


@pytest.fixture(scope="module")
def workers():
    pool = Workers(2)
    yield pool
    pool.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_in_one_process_and_in_two_workers(kind, tmp_path, workers):
    update = UpdateConfig(kind=kind, ratio=0.3, interval=2, whole_ends=False)
    many = {"rounds": 5, "clients": 5, "sampled": 3, "batch": 4}
    alone, spread = federate(tmp_path / "one", update, **many), federate(tmp_path / "two", update, workers, **many)
    for (one, trained), (two, others) in zip(alone, spread, strict=True):
        assert trained.clients == others.clients
        assert {n: a.tobytes() for n, a in one.items()} == {n: a.tobytes() for n, a in two.items()}


# Runs.


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_and_leaves_a_plain_network(kind, tmp_path):
    given = ["federation.clients_per_round=5", "federation.epochs=2", "data.max_examples=600", "rounds=8"]
    settings = config(*given, "data.max_test_examples=200", kind=kind)
    (summary,) = run(settings, tmp_path / "run", Watcher())
    assert summary.accuracy > 0.8  # 0.65 with a scale at which no update moves
    assert (summary.method, summary.params, summary.original_params) == (f"{kind}-update", 6_274, 6_274)
    plain, _ = model_of(config(kind="none"), examples_of(settings))
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert saved.keys() == plain.state_dict().keys()
    # The change of a layer that was never sent whole.
    assert not torch.equal(saved["features.4.weight"], plain.state_dict()["features.4.weight"])
    model = load_classifier(tmp_path / "run").model
    examples = examples_of(settings)
    with torch.no_grad():
        answers = model.eval()(examples.normalize(examples.test_inputs)).argmax(1)
    assert (answers == examples.test_labels).float().mean().item() == pytest.approx(summary.accuracy)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "interval", "after"), [("none", 1, 4), ("none", 2, 3), ("finetune", 1, 1), ("finetune", 2, 3)]
)
def test_a_run_that_was_stopped_ends_with_the_same_bits(kind, interval, after, tmp_path):
    given = [f"personalization.kind={kind}", "partition.held_out=0.2", f"update.interval={interval}", "rounds=5"]
    run(config(*given, kind="kronecker"), tmp_path / "whole", Watcher())
    with pytest.raises(LowrankError, match=f"interrupted after {after} finished rounds"):
        run(config(*given, kind="kronecker"), tmp_path / "stopped", Watcher(interrupt_after=after))
    resume(tmp_path / "stopped", Watcher())
    rows = [[{**row, "seconds": 0} for row in rows_of(tmp_path / name)] for name in ("whole", "stopped")]
    assert rows[0] == rows[1]
    for path in [*(tmp_path / "whole" / "clients").rglob("*.safetensors"), tmp_path / "whole" / "model.safetensors"]:
        other = tmp_path / "stopped" / path.relative_to(tmp_path / "whole")
        assert path.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_a_run_killed_within_a_round_ends_with_the_same_bits(tmp_path, monkeypatch):
    """Clients have gone on to weights that the checkpoint knows nothing of."""
    given = ["rounds=5", "federation.clients_per_round=3"]
    run(config(*given), tmp_path / "whole", Watcher())
    with monkeypatch.context() as patch:
        kill_before_checkpoint(patch, 4)
        with pytest.raises(SystemError):
            run(config(*given), tmp_path / "stopped", Watcher())
    resume(tmp_path / "stopped", Watcher())
    ends = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_a_run_does_not_go_on_from_another_start(tmp_path):
    start, stopped = tmp_path / "start", tmp_path / "stopped"
    run(config("rounds=1", kind="none"), start, Watcher())
    with pytest.raises(LowrankError, match="interrupted"):
        run(config(f"model.start={start}"), stopped, Watcher(interrupt_after=1))
    resume(start, Watcher(), ["rounds=2"])
    with pytest.raises(LowrankError) as caught:
        resume(stopped, Watcher())
    assert str(caught.value) == (
        f"the frozen weights under the updates of {stopped} are others than it began with; put the run in "
        f"model.start ({start}) back as it was, or start a new run"
    )


@pytest.mark.slow
def test_testing_changes_nothing_of_the_training(tmp_path):
    given = ["partition.held_out=0.2", "update.interval=2"]
    models = []
    for kind in ("none", "finetune"):
        run(config(*given, f"personalization.kind={kind}"), tmp_path / kind, Watcher())
        models.append((tmp_path / kind / "model.safetensors").read_bytes())
    assert models[0] == models[1]


@pytest.mark.slow
@pytest.mark.parametrize("more", [["rounds=7"], ["update.interval=2"], ["partition.held_out=0.2"]])
@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_sends_what_a_run_sends(kind, more, tmp_path):
    settings = config(*more, kind=kind)
    (summary,) = run(settings, tmp_path / "run", Watcher())
    (planned,) = plan(settings).runs
    for name in ("method", "params", "transferred_params", "original_params"):
        assert getattr(planned, name) == getattr(summary, name)
    for name in ("uplink_bytes", "downlink_bytes", "evaluation_bytes"):
        assert getattr(planned, name) == pytest.approx(getattr(summary, name), rel=1e-3, abs=60)


@pytest.mark.slow
def test_fewer_numbers_go_up_than_down_and_far_fewer_than_without_updates(tmp_path):
    sizes = {}
    for kind in ("none", "kronecker"):
        (planned,) = plan(config("rounds=20", "model.width=32", "update.ratio=0.03125", kind=kind)).runs
        sizes[kind] = planned
    whole, updates = sizes["none"], sizes["kronecker"]
    ends = 32 * 9 + 128 * 10 + 10 + 2 * (32 + 64 + 128)
    k = [math.ceil(size / 32**2 / 4) for size in (64 * 32 * 9, 128 * 64 * 9)]
    z = [math.ceil((size / n) ** 0.25) for size, n in zip((64 * 32 * 9, 128 * 64 * 9), k, strict=True)]
    assert updates.transferred_params == ends + sum(2 * n * side**2 for n, side in zip(k, z, strict=True))
    assert updates.uplink_bytes < updates.downlink_bytes < 0.15 * whole.downlink_bytes


@one_more_trial
@pytest.mark.slow
def test_two_supernodes_give_the_bits_of_the_local_engine(tmp_path):
    settings = config("rounds=2")
    run(settings, tmp_path / "alone", Watcher())
    engine = EngineConfig(kind="superlink", local_nodes=2)
    run(settings.model_copy(update={"engine": engine}), tmp_path / "nodes", Watcher())
    found = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("alone", "nodes")]
    assert found[0] == found[1]


# What does not go together.


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["model.method=fedpara"],
            "update.kind low-rank is of the original network's layers, and model.method",
        ),
        (["adapter.method=lora"], "changes the layers that adapter.method lora freezes; set adapter.method=null or"),
        (["strategy.name=scaffold"], "strategy.name scaffold does more with them than a mean; use fedavg or fedprox"),
        (["strategy.name=fedmedian"], "strategy.name fedmedian does more with them than a mean"),
        (
            ["partition.held_out=0.2", "personalization.kind=ditto"],
            "under personalization.kind ditto they do not; set personalization.kind to none or finetune",
        ),
        (["aggregation.gap=true"], "aggregation.gap is about weights that are factors, and under update.kind low-rank"),
        (["aggregation.kind=refit"], "aggregation.kind refit is about weights that are factors"),
        (["codec.up=int8"], "codec.up int8 and codec.down none write changes of what was sent, and under update.kind"),
        (["update.ratio=1"], "update.ratio"),
    ],
)
def test_what_updates_do_not_go_with_is_refused(more, message):
    with pytest.raises(UsageError) as caught:
        config(*more)
    assert message in str(caught.value)


def test_a_network_without_a_layer_between_its_ends_is_refused(tmp_path):
    with pytest.raises(UsageError) as caught:
        run(config("model.name=mlp"), tmp_path / "run", Watcher())
    assert str(caught.value) == (
        "model 'mlp' has no Linear or Conv2d between its first and its last layer that update.kind low-rank would make "
        "smaller at update.ratio 0.1; set update.whole_ends=false or a smaller ratio, or update.kind=none"
    )
