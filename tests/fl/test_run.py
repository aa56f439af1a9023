"""Whole runs as `lowrank fl run` makes them: files, determinism, interruption, and what is refused."""

import json
import signal
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from lowrank_core import LowrankError
from lowrank_fl import one_run
from lowrank_fl.load import load_config
from lowrank_fl.models.build import build_model
from lowrank_fl.plan import plan
from lowrank_fl.run import Interrupted, resume, run

SMALL = [
    "rounds=3",
    "federation.clients=6",
    "federation.clients_per_round=3",
    "federation.epochs=1",
    "model.width=4",
    "data.max_examples=120",
    "partition.kind=iid",
    "engine.workers=1",
]


class Watcher:
    """Remembers what a run tells; interrupts it after a round if asked to."""

    def __init__(self, interrupt_after: int = 0) -> None:
        self.interrupt_after = interrupt_after
        self.notes, self.starts, self.rows, self.ends = [], [], [], []

    def note(self, text):
        self.notes.append(text)

    def run_started(self, start):
        self.starts.append(start)

    def round_ended(self, row):
        self.rows.append(row)
        if len(self.rows) == self.interrupt_after:
            raise KeyboardInterrupt

    def run_ended(self, summary):
        self.ends.append(summary)


def small(*overrides: str):
    return load_config("quickstart", ["model.method=fedpara", *SMALL, *overrides])


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_leaves_everything_in_its_folder(tmp_path):
    out, watcher = tmp_path / "run", Watcher()
    (summary,) = run(small(), out, watcher)
    assert {path.name for path in out.iterdir()} == {
        ".lock",
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "model.safetensors",
        "model.json",
        "accuracy_vs_bytes.png",
        "checkpoint",
        "report.html",
    }
    rows = rows_of(out)
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert rows[-1]["accuracy"] == summary.accuracy == watcher.rows[-1].accuracy
    for key in ("uplink_bytes", "downlink_bytes", "total_bytes"):
        assert sum(row[key] for row in rows) == getattr(summary, key)
    assert json.loads((out / "summary.json").read_text())["params"] == summary.params
    assert yaml.safe_load((out / "config.yaml").read_text())["federation"]["clients"] == 6
    assert watcher.starts[0].rounds == 3
    assert watcher.ends == [summary]
    assert summary.params == summary.transferred_params < summary.original_params


@pytest.mark.slow
def test_the_saved_model_and_its_description_rebuild_the_network(tmp_path):
    config = small()
    (summary,) = run(config, tmp_path / "run", Watcher())
    described = json.loads((tmp_path / "run" / "model.json").read_text())
    model, _ = build_model(config.model, tuple(described["input_shape"]), len(described["classes"]), seed=1)
    model.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"), strict=True)
    assert sum(p.numel() for p in model.parameters()) == summary.params


@pytest.mark.slow
def test_two_runs_of_one_configuration_are_identical_but_for_the_clock(tmp_path):
    for name in ("one", "two"):
        run(small(), tmp_path / name, Watcher())
    first, second = ([{**row, "seconds": 0} for row in rows_of(tmp_path / name)] for name in ("one", "two"))
    assert first == second
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
@pytest.mark.parametrize("partition", ["iid", "dirichlet", "pathological"])
def test_the_number_of_worker_processes_changes_no_bit(tmp_path, strategy, partition):
    for workers in (1, 2):
        overrides = [f"engine.workers={workers}", f"strategy.name={strategy}", f"partition.kind={partition}"]
        run(small(*overrides, "model.jacobian_lambda=1", "model.tanh=true"), tmp_path / str(workers), Watcher())
    first, second = ([{**row, "seconds": 0} for row in rows_of(tmp_path / name)] for name in ("1", "2"))
    assert first == second
    assert (tmp_path / "1/model.safetensors").read_bytes() == (tmp_path / "2/model.safetensors").read_bytes()


@pytest.mark.slow
def test_another_seed_is_another_run(tmp_path):
    run(small(), tmp_path / "one", Watcher())
    run(small("seed=1"), tmp_path / "two", Watcher())
    assert rows_of(tmp_path / "one")[0]["loss"] != rows_of(tmp_path / "two")[0]["loss"]


@pytest.mark.slow
def test_a_sweep_has_a_folder_a_run_and_one_report(tmp_path):
    config = load_config("quickstart", SMALL, sweep=["model.method=original,fedpara", "seed=0,1"])
    summaries = run(config, tmp_path / "sweep", Watcher())
    assert [Path(s.run_dir).name for s in summaries] == ["original-0", "original-1", "fedpara-0", "fedpara-1"]
    assert summaries[1].swept == {"model.method": "original", "seed": 1}
    assert (tmp_path / "sweep" / "report.html").exists()
    assert len(rows_of(tmp_path / "sweep" / "fedpara-1")) == 3


@pytest.mark.slow
def test_ctrl_c_keeps_every_finished_round_and_says_where(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Interrupted) as caught:
        run(small(), out, Watcher(interrupt_after=2))
    assert caught.value.exit_code == 130
    assert str(caught.value) == f"interrupted after 2 finished rounds, which are kept in {out}"
    assert caught.value.summaries[0].interrupted
    assert len(rows_of(out)) == json.loads((out / "summary.json").read_text())["rounds"] == 2
    assert load_file(out / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("at", ["add_round", "save_checkpoint"])
def test_ctrl_c_amid_what_a_round_writes_waits_until_all_of_it_is_there(tmp_path, monkeypatch, at):
    owner = one_run.RunFolder if at == "add_round" else one_run
    write = getattr(owner, at)

    def interrupted_write(*given):
        write(*given)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(owner, at, interrupted_write)
    out = tmp_path / "run"
    with pytest.raises(Interrupted, match="after 1 finished rounds"):
        run(small(), out, Watcher())
    monkeypatch.undo()
    assert len(rows_of(out)) == json.loads((out / "summary.json").read_text())["rounds"] == 1
    resume(out, Watcher())
    run(small(), tmp_path / "whole", Watcher())
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


@pytest.mark.slow
def test_ctrl_c_in_a_sweep_keeps_the_runs_before_it_and_reports_them(tmp_path):
    config = load_config("quickstart", SMALL)
    with pytest.raises(Interrupted) as caught:
        run(config, tmp_path / "sweep", Watcher(interrupt_after=4))
    assert [s.interrupted for s in caught.value.summaries] == [False, True]
    assert (tmp_path / "sweep" / "report.html").exists()


@pytest.mark.slow
def test_without_a_folder_the_run_makes_one_named_by_the_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (summary,) = run(small("rounds=1"), None, Watcher())
    assert Path(summary.run_dir).parent == Path("runs")
    assert Path(summary.run_dir).name.startswith("quickstart-2")


def test_a_folder_that_holds_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(LowrankError, match="already holds files; choose another folder with --out, or remove it"):
        run(small(), tmp_path, Watcher())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LowrankError, match=r"cannot write to .*; choose another folder with --out"):
        run(small(), tmp_path / "file" / "run", Watcher())


def test_a_device_that_is_not_here_is_refused(tmp_path):
    with pytest.raises(LowrankError, match=r"device 'tpu9' cannot be used here \(.*\); try -o device=cpu"):
        run(small("device=tpu9"), tmp_path / "run", Watcher())


@pytest.mark.slow
def test_divergence_ends_the_run_with_the_finished_rounds_kept(tmp_path, monkeypatch):
    from lowrank_fl.training import Trainer

    train = Trainer.train

    def diverge_in_round_3(self, client, round_number, lr, drift=None, **options):
        return train(self, client, round_number, lr if round_number < 3 else 1e30, drift, **options)

    monkeypatch.setattr(Trainer, "train", diverge_in_round_3)
    out = tmp_path / "run"
    with pytest.raises(LowrankError, match=r"lower federation\.lr"):
        run(small("federation.epochs=9"), out, Watcher())
    assert len(rows_of(out)) == json.loads((out / "summary.json").read_text())["rounds"] == 2
    assert load_file(out / "model.safetensors")


@pytest.mark.slow
def test_layers_that_stayed_are_said(tmp_path):
    watcher = Watcher()
    run(small("model.gamma=null", "model.rank=30", "rounds=1"), tmp_path / "run", watcher)
    assert watcher.notes[0].startswith("features.4 stays as it is: rank 30 factors would hold ")


@pytest.mark.slow
def test_a_plan_costs_what_the_run_then_costs(tmp_path):
    config = small()
    (expected,) = plan(config).runs
    (summary,) = run(config, tmp_path / "run", Watcher())
    for key in ("params", "transferred_params", "original_params", "uplink_bytes", "downlink_bytes", "total_bytes"):
        assert getattr(expected, key) == getattr(summary, key)
    assert expected.paper_bytes == 2 * 3 * 4 * summary.params * 3
    assert expected.seconds > 0


@pytest.mark.slow
def test_the_plan_of_cifar10_iid_has_the_papers_gigabytes():
    original, fedpara = plan(load_config("cifar10-iid", sweep=["model.method=original,fedpara"])).runs
    # 2 x 16 participants x 4 bytes x 200 rounds, Figure 3: 15.25M and 1.55M parameters.
    assert original.paper_bytes / 1e9 == pytest.approx(390.5, abs=0.1)
    assert fedpara.paper_bytes / 1e9 == pytest.approx(39.6, abs=0.1)
    assert original.total_bytes == pytest.approx(original.paper_bytes, rel=0.001)
    assert fedpara.total_bytes == pytest.approx(fedpara.paper_bytes, rel=0.01)


@pytest.mark.slow
def test_a_plan_counts_three_times_the_forward_multiplications():
    (cost,) = plan(small("model.name=mlp", "model.method=original", "model.width=16", "federation.batch_size=20")).runs
    # 64-16-10, 20 examples a client in one batch, three clients; the first layer needs no gradient of its input.
    forward = 2 * (64 * 16 + 16 * 10)
    assert cost.flops_per_round == 3 * 20 * (3 * forward - 2 * 64 * 16)


@pytest.mark.parametrize("name", ["digits"])
def test_known_shapes_are_those_of_the_loader(name):
    from lowrank_fl.clients import examples_of
    from lowrank_fl.plan.shapes import SHAPES

    examples = examples_of(load_config("quickstart"))
    shape = SHAPES[name]
    assert examples.input_shape == shape.input_shape
    assert (len(examples.classes), len(examples.labels)) == (shape.classes, shape.examples)
