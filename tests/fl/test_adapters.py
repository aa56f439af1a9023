"""Adapters in federated runs: what travels and what is kept, a reference in plain torch, and models as starts."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import one_more_trial, small_examples
from safetensors.torch import load_file
from test_personal import KINDS
from test_run import Watcher, rows_of

from lowrank_core import LowrankError, UsageError
from lowrank_fl.clients import examples_of, model_of, parts_of
from lowrank_fl.config import AdapterConfig, EngineConfig, FederationConfig, ModelConfig, StrategyConfig
from lowrank_fl.data.examples import Parts
from lowrank_fl.data.rows import of_classes
from lowrank_fl.flops import Undrawn
from lowrank_fl.flower.grid import LocalGrid
from lowrank_fl.flower.records import to_arrays, to_record
from lowrank_fl.flower.remote import resident_of
from lowrank_fl.flower.rounds import Server
from lowrank_fl.flower.strategies import make_strategy
from lowrank_fl.flower.wire import Wire
from lowrank_fl.flower.workers import InProcess, Workers
from lowrank_fl.infer import load_classifier
from lowrank_fl.load import load_config
from lowrank_fl.models.adapted import put_adapter
from lowrank_fl.models.build import HEADS, build_model
from lowrank_fl.paper.match import essence
from lowrank_fl.plan import plan
from lowrank_fl.run import resume, run
from lowrank_fl.seeds import derive_seed
from lowrank_fl.state import local_names, personalization_of, state_of, trained_names, transferred
from lowrank_fl.training import LocalTraining

METHODS = ["lora", "loha", "lokr"]
SMALL = [
    "rounds=2",
    "federation.clients=4",
    "federation.clients_per_round=2",
    "federation.epochs=1",
    "model.method=original",
    "model.width=8",
    "adapter.rank=2",
    "data.max_examples=120",
    "data.max_test_examples=40",
    "partition.kind=iid",
    "engine.workers=1",
]


pytestmark = pytest.mark.usefixtures("quick")


def config(*more: str, method: str = "lora"):
    return load_config("quickstart", [*SMALL, f"adapter.method={method}", *more])


def personal(kind: str, *more: str, method: str = "lora"):
    return config("partition.held_out=0.2", f"personalization.kind={kind}", *more, method=method)


def base_names(model):
    return {name for name in state_of(model) if ".base." in name}


# What a network becomes.


@pytest.mark.parametrize("method", [*METHODS, "adalora"])
@pytest.mark.parametrize("network", ["cnn", "mlp", "vgg16", "resnet18"])
def test_an_adapter_is_on_every_linear_and_convolution_but_the_last_layer(network, method):
    shape = (1, 32, 32) if network == "vgg16" else (1, 16, 16)
    with torch.device("meta"), Undrawn():  # else torch imports its compiler
        model, _ = build_model(ModelConfig(name=network, method="original", width=8), shape, 5, seed=0)
        plain = dict(model.named_parameters())
        report = put_adapter(model, network, AdapterConfig(method=method, rank=2), seed=0)
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    layers = [n.removesuffix(".base") for n, m in model.named_modules() if isinstance(m, kinds)]
    assert [entry.name for entry in report.changed] == [name for name in layers if name != HEADS[network]]
    frozen = {n.replace(".base.", ".") for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n in plain if n.rpartition(".")[0] in {entry.name for entry in report.changed}}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and ".adapters." not in n}
    norms = (torch.nn.GroupNorm, torch.nn.BatchNorm2d)
    whole = {n for n, m in model.named_modules() if isinstance(m, norms)} | {HEADS[network]}
    assert {name.rpartition(".")[0] for name in trained} == whole
    assert report.original_params == sum(p.numel() for p in plain.values())
    assert report.params == sum(p.numel() for p in model.parameters())
    assert sum(entry.params for entry in report.changed) == report.params - report.original_params


def test_without_head_the_last_layer_is_a_layer_as_any_other():
    model, _ = model_of(config("adapter.head=false", "model.name=mlp"), examples_of(config()))
    assert {name.partition(".")[0] for name in trained_names(model)} == {"fc1", "fc2"}
    assert all(".adapters." in name for name in trained_names(model))


@pytest.mark.parametrize(("given", "zero"), [((), "hada_w2_a"), (("adapter.init=peft",), "hada_w2_b")])
def test_loha_begins_as_in_lycoris_unless_told_otherwise(given, zero):
    settings = config(*given, method="loha")
    model, _ = model_of(settings, examples_of(settings))
    empty = {name.rpartition(".")[2] for name, p in model.named_parameters() if "hada" in name and not p.any()}
    assert empty == {zero}


@pytest.mark.parametrize(("target", "layers"), [("[features.4]", [4]), (r"features\.[08]", [0, 8])])
def test_a_target_narrows_the_layers(target, layers):
    model, _ = model_of(config(f"adapter.target={target}"), examples_of(config()))
    adapted = {name.partition(".adapters.")[0] for name in trained_names(model) if ".adapters." in name}
    assert adapted == {f"features.{layer}" for layer in layers}
    assert "features.0.weight" in state_of(model).keys() - transferred(model).keys() or 0 in layers


def test_the_adapter_is_drawn_from_the_seed_and_adds_nothing_yet():
    examples = examples_of(config())
    models = {key: model_of(config(f"seed={seed}"), examples)[0].eval() for key, seed in enumerate((0, 0, 1))}
    drawn = {key: transferred(model)["features.0.adapters.default.lora_A"] for key, model in models.items()}
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    plain, _ = model_of(config(method="null"), examples)
    inputs = examples.normalize(examples.inputs[:5])
    torch.testing.assert_close(models[0](inputs), plain.eval()(inputs))


# What travels.


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_frozen_weights_are_in_no_message_no_checkpoint_and_no_state_of_a_client(method, tmp_path, monkeypatch):
    found: set[tuple[str, ...]] = set()
    send = LocalGrid.send_and_receive

    def watched(self, messages, **options):
        messages = list(messages)
        replies = send(self, messages, **options)
        for message in [*messages, *replies]:
            found.update(tuple(record) for record in message.content.array_records.values())
        return replies

    monkeypatch.setattr(LocalGrid, "send_and_receive", watched)
    settings = personal("ditto", "strategy.name=scaffold", method=method)
    run(settings, tmp_path / "plain", Watcher())
    model, _ = model_of(settings, examples_of(settings))
    base = base_names(model)
    assert len(base) == 3
    assert found == {tuple(name for name in state_of(model) if name not in base)}
    coded = personal("none", "strategy.name=scaffold", "codec.down=topk", "codec.up=topk", method=method)
    run(coded, tmp_path / "coded", Watcher())
    for folder in (tmp_path / "coded", tmp_path / "plain"):
        files = [*(folder / "clients").rglob("*.safetensors"), folder / "checkpoint" / "state.safetensors"]
        assert len(files) > 4
        kept = {name for file in files for name in load_file(file)}
        assert not any(".base." in name for name in kept)
        assert any(".adapters." in name for name in kept)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_a_clients_own_and_what_is_shared(kind, tmp_path):
    if kind == "pfedpara":
        with pytest.raises(UsageError, match="pfedpara keeps the factors of W2"):
            personal(kind)
        return
    settings = personal(kind)
    (summary,) = run(settings, tmp_path / "run", Watcher())
    model, _ = model_of(settings, examples_of(settings))
    local = local_names(model, personalization_of(settings))
    trained = set(state_of(model)) - base_names(model)
    expected = {"local": trained, "fedper": {"head.weight", "head.bias"}, "fedrep": {"head.weight", "head.bias"}}
    assert local == expected.get(kind, set())
    files = list((tmp_path / "run" / "clients").rglob("*.safetensors"))
    assert bool(files) == (kind in ("fedper", "fedrep", "local", "ditto"))
    for file in files:
        assert set(load_file(file)) == (trained if kind == "ditto" else local)
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert saved.keys() == state_of(model).keys()
    for name in base_names(model):
        torch.testing.assert_close(saved[name], state_of(model)[name], rtol=0, atol=0)
    (planned,) = plan(settings).runs
    assert planned.transferred_params == summary.transferred_params
    for name in ("uplink_bytes", "downlink_bytes", "evaluation_bytes"):
        assert getattr(planned, name) == pytest.approx(getattr(summary, name), rel=0.01, abs=300)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["fedavgm", "fedprox", "fedadam", "fedyogi", "fedadagrad", "scaffold", "feddyn", "fedmedian", "krum"]
)
def test_every_strategy_moves_the_adapter_and_leaves_the_base(name, tmp_path):
    settings = config(f"strategy.name={name}", "strategy.malicious=0", "federation.clients_per_round=4")
    run(settings, tmp_path / "run", Watcher())
    start = state_of(model_of(settings, examples_of(settings))[0])
    saved = load_file(tmp_path / "run" / "model.safetensors")
    changed = {key for key, tensor in saved.items() if not torch.equal(tensor, start[key])}
    assert changed == start.keys() - base_names(model_of(settings, examples_of(settings))[0])


# A plan.


@pytest.mark.slow
@pytest.mark.parametrize("method", ["null", *METHODS])
@pytest.mark.parametrize("codec", ["none", "int8"])
def test_a_plan_sends_what_a_run_sends(method, codec, tmp_path):
    settings = config(f"codec.up={codec}", f"codec.down={codec}", method=method)
    (summary,) = run(settings, tmp_path / "run", Watcher())
    (planned,) = plan(settings).runs
    for name in ("method", "params", "transferred_params", "original_params"):
        assert getattr(planned, name) == getattr(summary, name)
    for name in ("uplink_bytes", "downlink_bytes"):
        assert getattr(planned, name) == pytest.approx(getattr(summary, name), rel=1e-3, abs=20)
    assert planned.model_bytes == 4 * summary.transferred_params
    assert (summary.method, summary.original_params) == ({"null": "original"}.get(method, method), 6_274)


def test_a_plan_counts_lora_and_no_gradient_of_the_base():
    settings = config("model.name=mlp", "federation.batch_size=10", "data.max_examples=1200")
    (cost,) = plan(settings).runs
    (layer,) = cost.layers
    assert (layer.name, layer.rank, layer.original_params, layer.params) == ("fc1", 2, 64 * 8 + 8, 2 * (64 + 8))
    inputs, width, classes, rank = 64, 8, 10, 2
    # The base forwards alone, because nothing before it is trained; A x and A's gradient; B (A x), its gradient
    # and the gradient towards A; the last layer forwards and towards its weight and its input.
    products = inputs * width + 2 * inputs * rank + 3 * width * rank + 3 * width * classes
    # 300 examples a client, two clients.
    assert cost.flops_per_round == 2 * 300 * 2 * products


def test_a_plan_counts_a_step_as_large_as_the_runs_are(monkeypatch):
    """LoHa composes its weight for large batches alone."""
    seen = []
    from lowrank_fl.plan import work as module

    backward = module.backward
    monkeypatch.setattr(
        module, "backward", lambda model, inputs, *rest: seen.append(len(inputs)) or backward(model, inputs, *rest)
    )
    plan(config("federation.batch_size=16", method="loha"))
    assert set(seen) == {15, 14}  # 30 examples, two steps
    seen.clear()
    plan(config("federation.batch_size=16", method="null"))
    assert set(seen) == {2, 1}


# One reference, and the same bits.

SEED, LR = 7, 0.05


def mlp(method: str = "lora"):
    model, _ = build_model(ModelConfig(name="mlp", method="original", width=8), (1, 8, 8), 3, seed=1)
    put_adapter(model, "mlp", AdapterConfig(method=method, rank=2, alpha=6), seed=2)
    return model


def federate(folder, executor=None, *, method="lora", strategy="fedavg", rounds=1, clients=2, sampled=None):
    """After each round: what clients share, and who trained."""
    executor = executor or InProcess()
    examples, model = small_examples(), mlp(method)
    values = {"clients": clients, "clients_per_round": sampled or clients, "epochs": 2, "batch_size": 4, "lr": LR}
    settings = FederationConfig.model_validate({**values, "weight_decay": 0.01})
    parts = Parts([np.arange(client, 60, clients) for client in range(clients)], [])
    executor.set_up(model, examples, parts, LocalTraining(settings, 0.0, SEED, "cpu", 1, folder))
    grid = LocalGrid(clients, executor.execute, shared=executor.shared)
    arrays = to_record(transferred(model), shared=executor.shared)
    made = make_strategy(StrategyConfig(name=strategy), settings, trained_names(model))
    for trained in Server(made, grid, settings, Wire(), SEED).rounds(arrays, rounds):
        yield {name: array.copy() for name, array in to_arrays(trained.arrays).items()}, trained.clients


def test_a_round_of_lora_is_the_algorithm_written_out(tmp_path):
    start = {name: tensor.clone() for name, tensor in mlp().state_dict().items()}
    factors = [f"fc1.adapters.default.lora_{side}" for side in "AB"]
    names = [*factors, "fc2.weight", "fc2.bias"]
    examples, ends = small_examples(), []
    for client in range(2):
        rows = torch.arange(client, 60, 2)
        x, y = examples.normalize(examples.inputs[rows]).flatten(1), examples.labels[rows]
        torch.manual_seed(derive_seed(SEED, "client", 1, client))
        w = [start[name].clone() for name in names]
        for _ in range(2):
            for batch in torch.randperm(len(y)).split(4):
                a, b, weight, bias = leaves = [tensor.detach().requires_grad_() for tensor in w]
                hidden = F.linear(x[batch], start["fc1.base.weight"] + 6 / 2 * b @ a, start["fc1.base.bias"]).relu()
                loss = F.cross_entropy(F.linear(hidden, weight, bias), y[batch])
                gradients = torch.autograd.grad(loss, leaves)
                w = [t - LR * (g + 0.01 * t) for t, g in zip(w, gradients, strict=True)]
        ends.append(w)
    ((shared, _),) = federate(tmp_path)
    assert set(shared) == set(names)
    for name, *both in zip(names, *ends, strict=True):
        np.testing.assert_allclose(shared[name], torch.stack(both).mean(0), rtol=0, atol=1e-6)
        assert not torch.equal(torch.from_numpy(shared[name]), start[name])


@pytest.fixture(scope="module")
def workers():
    pool = Workers(2)
    yield pool
    pool.close()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "strategy"), [*((m, "fedavg") for m in METHODS), ("lora", "scaffold")])
def test_the_same_bits_in_one_process_and_in_two_workers(method, strategy, tmp_path, workers):
    many = {"method": method, "strategy": strategy, "rounds": 3, "clients": 5, "sampled": 3}
    alone, spread = federate(tmp_path / "one", **many), federate(tmp_path / "two", workers, **many)
    for (one, trained), (two, others) in zip(alone, spread, strict=True):
        assert trained == others
        assert {n: a.tobytes() for n, a in one.items()} == {n: a.tobytes() for n, a in two.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "fedrep", "ditto"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(kind, tmp_path):
    given = ("strategy.name=scaffold", "rounds=3", "codec.up=topk", f"model.start={tmp_path / 'start'}")
    run(config(method="null"), tmp_path / "start", Watcher())
    run(personal(kind, *given), tmp_path / "whole", Watcher())
    with pytest.raises(LowrankError, match="interrupted after 1 finished rounds"):
        run(personal(kind, *given), tmp_path / "stopped", Watcher(interrupt_after=1))
    resume(tmp_path / "stopped", Watcher())
    rows = [[{**row, "seconds": 0} for row in rows_of(tmp_path / name)] for name in ("whole", "stopped")]
    assert rows[0] == rows[1]
    for path in [*(tmp_path / "whole" / "clients").rglob("*.safetensors"), tmp_path / "whole" / "model.safetensors"]:
        other = tmp_path / "stopped" / path.relative_to(tmp_path / "whole")
        assert path.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_a_run_does_not_go_on_over_another_base(tmp_path):
    start, given = tmp_path / "start", f"model.start={tmp_path / 'start'}"
    run(config(method="null"), start, Watcher())
    with pytest.raises(LowrankError, match="interrupted"):
        run(config(given), tmp_path / "stopped", Watcher(interrupt_after=1))
    resume(start, Watcher(), ["rounds=3"])
    with pytest.raises(LowrankError) as caught:
        resume(tmp_path / "stopped", Watcher())
    assert str(caught.value) == (
        f"the frozen weights under the adapter of {tmp_path / 'stopped'} are others than it began with; put the run in "
        f"model.start ({start}) back as it was, or start a new run"
    )


def test_a_client_that_is_dropped_leaves_the_adapter_to_the_others(tmp_path, monkeypatch):
    from lowrank_fl.training import Trainer

    train = Trainer._train

    def failing(self, client, *rest):
        if client == 1:
            raise LowrankError("the disk is gone")
        return train(self, client, *rest)

    monkeypatch.setattr(Trainer, "_train", failing)
    run(config("federation.clients_per_round=4", "federation.tolerated_failures=0.3"), tmp_path / "run", Watcher())
    assert [row["dropped"] for row in rows_of(tmp_path / "run")] == 2 * [{"1": "the disk is gone"}]


# A run as the start of another, and afterwards.


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A finished run without an adapter, on five of ten classes, and one with LoRA that started from it."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowrank_fl.one_run.write_report", lambda out, summaries: None)
        run(config("data.classes=[0,1,2,3,4]", "rounds=4", method="null"), folder / "plain", Watcher())
        run(config(f"model.start={folder / 'plain'}"), folder / "lora", Watcher())
    return folder


@pytest.mark.slow
def test_every_client_starts_from_the_other_runs_weights(started):
    settings = config(f"model.start={started / 'plain'}")
    model, report = model_of(settings, examples_of(settings))
    held, saved = state_of(model), load_file(started / "plain" / "model.safetensors")
    adapted = {f"{entry.name}.weight" for entry in report.changed}
    for name, tensor in saved.items():
        layer, _, last = name.rpartition(".")
        assert torch.equal(held[f"{layer}.base.{last}" if name in adapted else name], tensor)
    after = load_file(started / "lora" / "model.safetensors")
    assert all(torch.equal(after[name], held[name]) for name in base_names(model))


@pytest.mark.slow
@pytest.mark.parametrize("start", ["null", "plain"])
def test_nodes_make_the_frozen_weights_from_the_configuration(start, started, tmp_path):
    settings = config(f"model.start={'null' if start == 'null' else started / start}")
    resident = resident_of(settings.model_dump_json(), tmp_path)
    model, _ = model_of(settings, examples_of(settings))
    assert all(torch.equal(t, state_of(model)[name]) for name, t in state_of(resident.trainer.model).items())
    assert not base_names(model) & resident.trainer.state.keys()


@one_more_trial
@pytest.mark.slow
def test_two_supernodes_give_the_bits_of_the_local_engine(started, tmp_path):
    given = [f"model.start={started / 'plain'}", "rounds=2", "codec.up=fp16"]
    given += ["adapter.warmup=0", "adapter.settle=0"]
    # AdaLoRA sends all that the others do, and more.
    settings = config(*given, method="adalora")
    alone, nodes = tmp_path / "alone", tmp_path / "nodes"
    run(settings, alone, Watcher())
    engine = EngineConfig(kind="superlink", local_nodes=2)
    run(settings.model_copy(update={"engine": engine}), nodes, Watcher())
    assert (alone / "model.safetensors").read_bytes() == (nodes / "model.safetensors").read_bytes()
    assert [row["layer_ranks"] for row in rows_of(alone)] == [row["layer_ranks"] for row in rows_of(nodes)]
    assert (nodes / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("method", ["null", "lora"])
def test_with_other_classes_the_last_layer_alone_is_drawn_anew(method, tmp_path, started):
    settings = config(f"model.start={started / 'plain'}", method=method)
    examples = dataclasses.replace(examples_of(settings), classes=tuple("0123456"))
    saved = load_file(started / "plain" / "model.safetensors")
    held = state_of(model_of(settings, examples)[0])
    drawn = state_of(model_of(config(method="null"), examples)[0])
    assert held["head.weight"].shape == (7, 32)
    assert torch.equal(held["head.weight"], drawn["head.weight"])
    assert torch.equal(held["features.2.weight"], saved["features.2.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedpara", "lowrank"])
def test_a_factorized_network_may_start_from_one_like_it(method, tmp_path):
    like = [f"model.method={method}", "rounds=1"]
    run(config(*like, method="null"), tmp_path / "first", Watcher())
    settings = config(*like, f"model.start={tmp_path / 'first'}", "seed=5", method="null")
    held = state_of(model_of(settings, examples_of(settings))[0])
    saved = load_file(tmp_path / "first" / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in held.items())
    assert run(settings, tmp_path / "second", Watcher())[0].method == method


def test_the_start_of_a_run_with_an_adapter_is_that_adapter_merged(started):
    settings = config(f"model.start={started / 'lora'}", method="null")
    examples = examples_of(settings)
    merged = model_of(settings, examples)[0].eval()
    inputs = examples.normalize(examples.test_inputs)
    expected = load_classifier(started / "lora").model(inputs)
    torch.testing.assert_close(merged(inputs), expected, rtol=1e-4, atol=1e-4)
    assert not any("adapters" in name for name in state_of(merged))
    again, _ = model_of(config(f"model.start={started / 'lora'}", method="loha"), examples)
    torch.testing.assert_close(again.eval()(inputs), expected, rtol=1e-4, atol=1e-4)


def test_infer_builds_the_adapter_too(started):
    examples = examples_of(config())
    classifier = load_classifier(started / "lora")
    logits = classifier(examples.normalize(examples.test_inputs))
    accuracy = (logits.argmax(1) == examples.test_labels).double().mean().item()
    assert accuracy == pytest.approx(rows_of(started / "lora")[-1]["accuracy"])
    assert json.loads((started / "lora" / "model.json").read_text())["adapter"]["method"] == "lora"


@pytest.mark.slow
def test_infer_takes_a_clients_own_part(tmp_path):
    run(personal("fedper"), tmp_path / "run", Watcher())
    client = rows_of(tmp_path / "run")[-1]["clients"][0]
    own = state_of(load_classifier(tmp_path / "run", client).model)
    shared = state_of(load_classifier(tmp_path / "run").model)
    assert {name for name in own if not torch.equal(own[name], shared[name])} == {"head.weight", "head.bias"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "method"), [("cnn", "lora"), ("cnn", "loha"), ("cnn", "lokr"), ("resnet18", "lora")]
)
def test_peft_puts_the_adapter_on_the_base(network, method, tmp_path):
    peft = pytest.importorskip("peft")
    data = ["data.max_examples=8", "data.max_test_examples=8", "rounds=1"]
    settings = config(f"model.name={network}", "adapter.alpha=4", *data, method=method)
    examples = examples_of(settings)
    if network == "resnet18":  # 8x8 pixels are too small for it, so it is built alone
        from lowrank_fl.models.adapted import write_adapter

        model, _ = build_model(settings.model, (1, 16, 16), 10, seed=3)
        base, _ = build_model(settings.model, (1, 16, 16), 10, seed=3)
        put_adapter(model, network, settings.adapter, seed=0)
        for parameter in model.parameters():
            parameter.data += 0.01 * parameter.requires_grad
        for name, buffer in model.named_buffers():
            buffer.data += 0.1 if name.endswith("running_mean") else 0
        write_adapter(model, network, settings.adapter, tmp_path / "run" / "adapter")
        inputs = torch.randn(4, 1, 16, 16)
    else:
        run(settings, tmp_path / "run", Watcher())
        model = load_classifier(tmp_path / "run").model
        base, _ = model_of(config(f"model.name={network}", method="null"), examples)
        inputs = examples.normalize(examples.test_inputs)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    torch.testing.assert_close(loaded(inputs), model.eval()(inputs), rtol=1e-4, atol=1e-4)


# Some of a data set's classes.


def test_only_examples_of_the_classes_are_kept_with_their_labels():
    whole = examples_of(config("data.max_examples=null", "data.max_test_examples=null"))
    some = examples_of(config("data.classes=[7, '2']", "data.max_examples=null", "data.max_test_examples=null"))
    kept = torch.isin(whole.labels, torch.tensor([2, 7]))
    assert torch.equal(some.labels, whole.labels[kept])
    assert torch.equal(some.inputs, whole.inputs[kept])
    assert set(some.test_labels.tolist()) == {2, 7}
    assert (some.classes, some.mean, some.std) == (whole.classes, whole.mean, whole.std)
    # The largest number of examples is that of the classes that are kept.
    few = examples_of(config("data.classes=[2,7]", "data.max_examples=50"))
    assert (len(few.labels), len(few.test_labels), set(few.labels.tolist())) == (50, 40, {2, 7})
    settings = config("data.classes=[2,7]", "data.max_examples=50", "partition.kind=dirichlet")
    assert sum(len(rows) for rows in parts_of(settings, few).train) == 50


@pytest.mark.slow
def test_a_plan_counts_the_examples_of_the_classes_alone():
    settings = [
        config(f"data.classes={c}", "data.max_examples=null", "federation.batch_size=1") for c in ("null", "[2,7]")
    ]
    costs = [plan(each).runs[0] for each in settings]
    share = len(examples_of(settings[1]).labels) / len(examples_of(settings[0]).labels)
    assert costs[1].flops_per_round == pytest.approx(share * costs[0].flops_per_round, rel=0.01)


@pytest.mark.parametrize("wanted", ["11", "eleven"])
def test_a_class_that_is_not_there(wanted):
    with pytest.raises(UsageError) as caught:
        examples_of(config(f"data.classes=[1,{wanted}]"))
    said = wanted if wanted == "11" else f"'{wanted}'"
    assert str(caught.value) == (
        f"data.classes names {said}, and digits has the classes 0 to 9, '0' to '9'; name some of these, by number or "
        "by name"
    )


def test_classes_that_no_test_example_has():
    examples = dataclasses.replace(small_examples(), test_labels=torch.zeros(30, dtype=torch.int64))
    with pytest.raises(LowrankError) as caught:
        of_classes(examples, ["b", 2])
    assert str(caught.value) == "no test example of bright is of the classes ['b', 2] (data.classes); add some"


# What is refused, and what a report says.


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["model.method=fedpara"],
            "adapter.method lora goes onto the layers of the original network, and model.method fedpara writes them as "
            "factors; set model.method=original, and sweep over no other",
        ),
        (
            ["adapter.head=false", "personalization.kind=fedrep", "partition.held_out=0.2"],
            "personalization.kind fedrep keeps the last layer with each client, and with adapter.head false it is "
            "frozen but for an adapter; set adapter.head=true",
        ),
        *(
            (
                [f"aggregation.{key}={value}"],
                f"{said} is about weights that are factors alone, and adapter.method lora adds its factors to frozen "
                "weights; set aggregation.kind=factors and aggregation.gap=false",
            )
            for key, value, said in (
                ("kind", "refit", "aggregation.kind refit"),
                ("kind", "one-factor", "aggregation.kind one-factor"),
                ("gap", "true", "aggregation.gap"),
            )
        ),
        (["data.classes=[]"], "data.classes: list should have at least 1 item after validation, not 0, got []"),
    ],
)
def test_what_does_not_go_together(given, message):
    with pytest.raises(UsageError) as caught:
        config(*given)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["adapter.target=[conv]"], "adapter.target 'conv' matches no module"),
        (
            ["adapter.target=[head]"],
            "no layer is left to adapt: adapter.head leaves out everything that adapter.target",
        ),
        (["adapter.target=features.2"], "features.2 is of type GroupNorm, and adapters go to"),
    ],
)
def test_a_target_that_means_nothing(given, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        model_of(config(*given), examples_of(config()))


def test_a_network_without_layers_for_an_adapter():
    settings = config("model.name=lstm")
    with pytest.raises(UsageError) as caught:
        model_of(settings, small_examples(is_text=True))
    assert str(caught.value) == (
        "model 'lstm' has no Linear or Conv2d for an adapter besides its last layer; name other layers in "
        "adapter.target, or set adapter.head=false"
    )
    model_of(config("model.name=lstm", "adapter.target=[embedding]"), small_examples(is_text=True))


@pytest.mark.parametrize(
    ("given", "difference"),
    [
        (["model.width=16"], "features.0.weight is 8x1x3x3 there and 16x1x3x3 in this run's network"),
        (["model.name=mlp"], "fc1.bias is missing there and 8 in this run's network"),
        (["model.method=lowrank"], "features.4.weight is 16x8x3x3 there and missing in this run's network"),
    ],
)
def test_a_start_of_another_network(given, difference, started):
    folder = started / "plain"
    settings = config(f"model.start={folder}", *given, method="null")
    with pytest.raises(LowrankError) as caught:
        model_of(settings, examples_of(settings))
    assert str(caught.value) == (
        f"model.start is {folder}, and {difference}; set the keys of model as {folder / 'config.yaml'} has them, or "
        "start from another run"
    )


def test_a_start_that_is_no_finished_run(tmp_path, started):
    for folder, hint in (
        (tmp_path, "finish it with lowrank fl run --resume"),
        (started, f"such as {started / 'lora'}"),
    ):
        settings = config(f"model.start={folder}")
        with pytest.raises(LowrankError) as caught:
            model_of(settings, examples_of(settings))
        assert f"{folder} has no model.json, which a finished run has; " in str(caught.value)
        assert hint in str(caught.value)


def test_keys_of_an_adapter_count_only_where_there_is_one():
    plain = essence(config("adapter.rank=3", "adapter.alpha=3", "adapter.head=false", method="null"))
    assert plain == essence(config("adapter.rank=2", method="null"))
    assert not any(key.startswith("adapter.") for key in plain)
    assert essence(config(method="lora")) != essence(config(method="loha"))
    assert hash(tuple(essence(config("adapter.target=[features.0]", "data.classes=[1,2]")).items()))


def test_a_report_names_the_adapter(tmp_path):
    from made_runs import write_run

    from lowrank_fl.reporting.groups import group_runs
    from lowrank_fl.reporting.read import find_runs
    from lowrank_fl.reporting.text import label_of

    own = {
        "a": ["adapter.method=null"],
        "b": ["adapter.method=lora"],
        "c": ["adapter.method=loha", "adapter.rank=4", "adapter.alpha=4"],
        "d": ["adapter.method=lora", "personalization.kind=fedper"],
    }
    for name, given in own.items():
        write_run(tmp_path / name, "mnist", "model.method=original", "partition.held_out=0.2", *given)
    labels = [group.label for group in group_runs(find_runs([tmp_path]).runs)]
    assert labels == [
        "original",
        "lora, rank 8, adapter alpha 8.0",
        "loha, rank 4, adapter alpha 4.0",
        "lora, rank 8, fedper, adapter alpha 8.0",
    ]
    assert label_of("lora", {"adapter.method": "lora", "adapter.rank": 4}) == "lora, rank 4"
