"""Compiled steps against plain ones."""

import shutil

import pytest
import torch
from cases import equal_parts, how, small_examples, small_model
from test_run import Watcher
from torch import nn

from lowrank_core import LowrankError, UsageError, factorize
from lowrank_fl.execution.compiled import CompiledTrainer
from lowrank_fl.load import load_config
from lowrank_fl.run import run
from lowrank_fl.training import Trainer


def tracer():
    """The graphs that torch has traced, and a backend that computes them as they are."""
    graphs = []

    def as_traced(graph, _):
        graphs.append(graph)
        return graph.forward

    return graphs, as_traced


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 24), nn.Linear(24, 3)
    )
    factorize(model, "fedpara", rank=2, exclude=["0"])
    return model


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_traced_step_ends_where_a_plain_one_does(precision):
    examples, ends, (graphs, as_traced) = small_examples(), [], tracer()
    local = how(momentum=0.9, epochs=2, batch_size=4, precision=precision)  # 15 examples: the last batch has 3

    for kind in (Trainer, lambda *given: CompiledTrainer(*given, backend=as_traced)):
        trainer = kind(network(), examples, equal_parts(examples, 4), local)
        losses = [trainer.train(client, number, 0.02).loss for number, client in enumerate((0, 1), 1)]
        assert len(graphs) == (0 if kind is Trainer else 1)
        # What is trained changes, and with it what was traced.
        losses.append(trainer.train(2, 3, 0.02, only={"5.weight", "5.bias"}).loss)
        ends.append((losses, trainer.state))
    assert len(graphs) == 2
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(ends[1][1][name], expected) for name, expected in ends[0][1].items())


@pytest.mark.slow
def test_a_process_of_many_runs_compiles_for_each():
    examples, (graphs, as_traced) = small_examples(), tracer()

    for count in range(1, 11):  # torch keeps eight variants of a function, and then computes it as ever
        CompiledTrainer(small_model(), examples, equal_parts(examples, 4), how(), backend=as_traced).train(0, 1, 0.02)
        assert len(graphs) == count


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler takes g++ on a CPU, which is missing")
def test_a_run_by_compiled_steps_reports_what_a_plain_one_does(tmp_path, monkeypatch):
    small = ["model.name=mlp", "model.width=8", "data.max_examples=60", "federation.clients=3", "sweep={}", "rounds=2"]
    small += ["federation.clients_per_round=3", "federation.batch_size=4", "engine.workers=1"]
    results = []
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for way in ("sequential", "compiled"):
        (summary,) = run(load_config("quickstart", small, engine=way), tmp_path / way, Watcher())
        assert summary.execution == way
        results.append(summary)
    assert results[1].accuracy == pytest.approx(results[0].accuracy, abs=0.02)


def test_what_torch_cannot_compile_is_said_in_a_sentence():
    examples = small_examples()

    def broken(*_):
        raise RuntimeError("no compiler\nwas found")

    trainer = CompiledTrainer(small_model(), examples, equal_parts(examples, 4), how(), backend=broken)
    with pytest.raises(
        LowrankError, match=r"^torch.compile failed \(.*no compiler.*\); mend that, or set engine"
    ) as at:
        trainer.train(0, 1, 0.02)
    assert "\n" not in str(at.value)


def test_a_cpu_without_a_compiler_is_told_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/nonexistent"))
    examples = small_examples()
    with pytest.raises(LowrankError, match=r"^engine.execution compiled takes a C\+\+ compiler on a CPU, and none was"):
        CompiledTrainer(small_model(), examples, equal_parts(examples, 4), how())


def test_what_a_compiled_step_cannot_do_is_refused():
    with pytest.raises(
        UsageError, match=r"compiled leaves no composed weight to correct, and model.jacobian_lambda is 1"
    ):
        load_config("quickstart", ["model.method=fedpara", "model.jacobian_lambda=1", "sweep={}"], engine="compiled")
    adalora = ["model.method=original", "adapter.method=adalora", "sweep={}"]
    with pytest.raises(UsageError, match=r"engine.execution compiled compiles a step for layers of fixed sizes"):
        load_config("quickstart", adalora, engine="compiled")
