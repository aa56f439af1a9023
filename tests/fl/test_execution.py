"""Captured steps, and the way that `auto` settles on, as far as a CPU can tell; and where a data set lies."""

import json
from dataclasses import replace

import pytest
import torch
from cases import equal_parts, how, small_examples, small_model
from safetensors.torch import load_file
from test_run import Watcher
from torch import nn

from lowrank_core import LowrankError, UsageError, factorize
from lowrank_fl.clients import training_of
from lowrank_fl.data.placement import on_device
from lowrank_fl.execution import choice
from lowrank_fl.execution.graphs import GraphTrainer
from lowrank_fl.execution.make import make_trainer
from lowrank_fl.load import load_config
from lowrank_fl.run import run
from lowrank_fl.training import Trainer


def run_again(work):
    """What stands for a CUDA graph here: it runs the work as often as capturing does, and then whenever asked."""
    for _ in range(4):
        work()
    return work


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(144, 24),
        nn.Linear(24, 3),
    )
    report = factorize(model, "fedpara", rank=2, exclude=["0"])
    assert [entry.name for entry in report.changed] == ["5"]
    return model


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_a_captured_step_gives_the_bits_of_a_plain_one(strength):
    """Statistics and dropouts included: capturing draws and averages, and what it did is put back."""
    examples, ends, captured = small_examples(), [], []

    def capture(work):
        captured.append(work)
        return run_again(work)

    for kind in (lambda *a: GraphTrainer(*a, capture), Trainer):
        local = replace(how(momentum=0.9, epochs=2, batch_size=4), jacobian_lambda=strength)
        trainer = kind(network(), examples, equal_parts(examples, 4), local)  # 15 examples: the last batch has 3
        for round_number, (client, lr) in enumerate([(0, 0.05), (1, 0.05), (0, 0.02)], 1):
            trainer.train(client, round_number, lr)
        trainer.train(2, 4, 0.02, only={"6.weight", "6.bias"})
        ends.append([tensor.clone() for tensor in trainer.state.values()])
    assert all(torch.equal(got, expected) for got, expected in zip(*ends, strict=True))
    # One for all rates, or one a rate where the correction has it in its step; and one for the last layer alone.
    assert len(captured) == (3 if strength else 2)


def test_only_so_many_captured_steps_are_kept():
    examples = small_examples()
    trainer = GraphTrainer(
        network(), examples, equal_parts(examples, 4), replace(how(), jacobian_lambda=1.0), run_again
    )
    for number in range(1, 8):
        trainer.train(0, number, 0.01 / number)
        assert len(trainer._steps) <= 4


def test_graphs_are_refused_where_there_is_no_gpu():
    examples = small_examples()
    with pytest.raises(LowrankError, match="graphs captures CUDA graphs, and device is cpu; set device=cuda"):
        make_trainer(small_model(), examples, equal_parts(examples, 4), replace(how(), execution="graphs"))
    with pytest.raises(UsageError, match="graphs replays CUDA graphs, and device is cpu"):
        load_config("quickstart", engine="graphs")


@pytest.mark.parametrize("way", ["graphs", "batched"])
def test_on_a_gpu_a_way_ends_where_the_sequential_one_ends(cuda, way):
    examples, ends = small_examples(), []
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))
    for execution in ("sequential", way):
        local = replace(how(momentum=0.9), device=str(cuda), execution=execution)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))
        network.load_state_dict(model.state_dict())
        trainer = make_trainer(network, examples, equal_parts(examples, 4), local)
        assert trainer.examples.inputs.is_cuda
        start = {name: tensor.clone() for name, tensor in trainer.state.items()}
        trainer.expect([0, 1])
        for client in (0, 1):
            trainer.load(start)
            trainer.train(client, 1, 0.05)
        ends.append([tensor.cpu() for tensor in trainer.state.values()])
    for got, expected in zip(*ends, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["local", "graphs", "batched"])
def test_on_a_gpu_a_run_ends_near_that_of_a_cpu(cuda, tmp_path, way):
    """Orders are drawn on the CPU for every device."""
    small = ["model.name=mlp", "model.width=8", "model.method=fedpara", "data.max_examples=60", "federation.clients=3"]
    small += ["federation.clients_per_round=3", "engine.workers=1", "sweep={}", "rounds=2"]
    run(load_config("quickstart", small), tmp_path / "cpu", Watcher())
    run(load_config("quickstart", [*small, f"device={cuda}"], engine=way), tmp_path / "gpu", Watcher())
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("gpu", "cpu"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


def test_ways_are_timed_on_the_same_work_and_left_out_with_a_reason(monkeypatch):
    examples = small_examples()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))
    before = [parameter.clone() for parameter in model.parameters()]
    seconds, left_out = choice.time_ways(
        ["sequential", "batched", "graphs"], model, examples, equal_parts(examples, 4), how()
    )
    assert set(seconds) == {"sequential", "batched"}
    assert all(taken > 0 for taken in seconds.values())
    assert left_out["graphs"].startswith("engine.execution graphs captures CUDA graphs")
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True))

    class Wrong(Trainer):
        def train(self, *args, **kwargs):
            return replace(super().train(*args, **kwargs), loss=0.123)

    make = choice.make_trainer
    monkeypatch.setattr(
        choice, "make_trainer", lambda m, e, p, h: Wrong(m, e, p, h) if h.execution == "graphs" else make(m, e, p, h)
    )
    _, left_out = choice.time_ways(["sequential", "graphs"], model, examples, equal_parts(examples, 4), how())
    assert "off those of sequential" in left_out["graphs"]


def test_auto_takes_the_fastest_says_so_and_keeps_to_it(tmp_path, monkeypatch):
    """On a device that is no CPU, which here is one in name alone."""
    config = load_config("quickstart", ["model.name=mlp", "sweep={}", "device=cuda"], engine="auto")
    local = training_of(config, tmp_path / "clients")
    asked = []

    def times(ways, *_):
        asked.append(ways)
        return {"sequential": 2.0, "batched": 0.5}, {"graphs": "out of memory"}

    monkeypatch.setattr(choice, "time_ways", times)
    notes = []
    for _ in range(2):
        settled = choice.settle(None, None, None, local, config, tmp_path, notes.append)
        assert settled == replace(local, execution="batched")
    assert asked == [["sequential", "batched", "graphs"]]
    assert notes == [
        "engine.execution auto: batched, which takes 0.5 s for an epoch of a round's clients (sequential 2 s); "
        "graphs left out: out of memory"
    ]
    record = json.loads((tmp_path / "execution.json").read_text())
    assert record["execution"] == "batched"
    assert record["seconds"] == {"sequential": 2.0, "batched": 0.5}


@pytest.mark.slow
def test_auto_on_a_cpu_is_sequential_to_the_bit(tmp_path):
    small = ["model.name=mlp", "model.width=8", "data.max_examples=60", "federation.clients=3", "sweep={}", "rounds=1"]
    small += ["federation.clients_per_round=3", "engine.workers=1"]
    watcher = Watcher()
    (summary,) = run(load_config("quickstart", small, engine="auto"), tmp_path / "auto", watcher)
    run(load_config("quickstart", small), tmp_path / "plain", Watcher())
    assert summary.execution == "sequential"
    assert any(note.startswith("engine.execution auto: clients train one after the other") for note in watcher.notes)
    assert not (tmp_path / "auto" / "execution.json").exists()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("auto", "plain")]
    assert weights[0] == weights[1]


def test_the_engine_flag_takes_a_kind_or_a_way_of_the_local_one():
    assert load_config("quickstart", engine="auto").engine.execution == "auto"
    assert load_config("quickstart", engine="ray").engine.kind == "ray"
    assert load_config("quickstart").engine.execution == "sequential"
    with pytest.raises(UsageError) as caught:
        load_config("quickstart", engine="compile")
    assert str(caught.value) == (
        "--engine takes local, ray, superlink, or how local trains: auto, sequential, batched, graphs, compiled; got "
        "'compile' (nearest: compiled)"
    )


def test_a_data_set_lies_on_the_device_where_it_takes_half_of_the_free_memory_at_the_most():
    examples = small_examples()
    held = (examples.inputs, examples.labels, examples.test_inputs, examples.test_labels)
    size = sum(tensor.nbytes for tensor in held)
    meta = torch.device("meta")
    placed = on_device(examples, meta, free=2 * size)
    assert {t.device for t in (placed.inputs, placed.labels, placed.test_inputs, placed.test_labels)} == {meta}
    assert on_device(examples, meta, free=2 * size - 1) is examples
    assert on_device(examples, torch.device("cpu")) is examples
