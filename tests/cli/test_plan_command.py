"""`lowrank fl run --plan`, with costs made up."""

import dataclasses
import json

import pytest

from lowrank_fl.load import load_config
from lowrank_fl.results import RunSummary

SINGLE = ("fl", "run", "--plan", "-o", "model.method=fedpara")


@pytest.fixture(autouse=True)
def _costs(monkeypatch):
    import lowrank_fl.plan
    from lowrank_core.candidates import LeftEntry
    from lowrank_core.replacement import FactorizedEntry
    from lowrank_fl.load import expand

    def plan(config):
        layer = FactorizedEntry("features.4", "Conv2d", (64, 32, 3, 3), 8, 64, 18_432, 2_688)
        return lowrank_fl.plan.Plan(
            [
                lowrank_fl.plan.RunPlan(
                    name=single.name,
                    method=single.model.method,
                    swept=swept,
                    rounds=10,
                    clients=100,
                    clients_per_round=4,
                    params=1_000_000,
                    transferred_params=1_000_000,
                    original_params=10_000_000,
                    model_bytes=4_000_000,
                    uplink_bytes=160_001_000,
                    downlink_bytes=160_002_000,
                    total_bytes=320_003_000,
                    paper_bytes=320_000_000,
                    flops_per_round=12_340_000_000_000,
                    seconds=7_260.0,
                    layers=(layer,),
                    left=(LeftEntry("head", "excluded"),),
                )
                for single, swept in expand(config)
            ]
        )

    monkeypatch.setattr(lowrank_fl.plan, "plan", plan)


def test_the_plan_of_one_run_lists_costs_and_layers(lowrank):
    outcome = lowrank(*SINGLE)
    assert outcome.code == 0
    lines = [" ".join(line.split()) for line in outcome.out.splitlines()]
    for line in [
        "params 1,000,000",
        "of original 10.0%",
        "MB a round 32.0",
        "of these to the server 16.0",
        "transfer at 10 Mbps 6.10 s a round",
        "GB total 0.320",
        "GB by the paper's arithmetic 0.320",
        "tested by the server",
        "GFLOP a round 12,300",
        "TFLOP total 123",
        "estimated time 2 h 1 min",
        "features.4 Conv2d 64x32x3x3 8 64 18,432 2,688",
        "head stays as it is: excluded",
    ]:
        assert line in lines


def test_a_plan_says_where_clients_test_and_what_that_sends(lowrank, monkeypatch):
    import lowrank_fl.plan

    made = lowrank_fl.plan.plan(load_config("mnist", ["model.method=fedpara"])).runs[0]
    tested = lowrank_fl.plan.Plan([dataclasses.replace(made, evaluation_bytes=1_230_000_000)])
    monkeypatch.setattr(lowrank_fl.plan, "plan", lambda config: tested)
    lines = [" ".join(line.split()) for line in lowrank(*SINGLE).out.splitlines()]
    assert "tested by all 100 clients" in lines
    assert "GB to test 1.23" in lines
    assert json.loads(lowrank(*SINGLE, "--json").out)["evaluation_bytes"] == 1_230_000_000


def test_the_plan_of_a_sweep_counts_the_layers(lowrank):
    out = lowrank("fl", "run", "--plan").out
    assert out.splitlines()[0].split() == ["run", "original", "lowrank", "fedpara"]
    assert "features.4" not in out
    assert "layers changed" in out


def test_the_runs_that_do_not_fit_side_by_side_stand_below(lowrank):
    lines = lowrank(*SINGLE, "--sweep", "seed=" + ",".join(map(str, range(10)))).out.splitlines()
    headings = [line.split()[1:] for line in lines if line.startswith("run ")]
    assert headings == [[word for seed in seeds for word in ("seed", str(seed))] for seeds in (range(8), range(8, 10))]


def test_json_has_the_keys_of_a_run_and_null_for_what_only_a_run_knows(lowrank):
    tree = json.loads(lowrank(*SINGLE, "--json", "--seed", "3").out)
    assert {field.name for field in dataclasses.fields(RunSummary)} <= tree.keys()
    assert (tree["accuracy"], tree["loss"], tree["run_dir"]) == (None, None, None)
    assert tree["transfer_seconds_at_mbps"]["10"] == pytest.approx(8 * 320_003_000 / 10 / 4 / 10 / 2**20)
    assert (tree["seed"], tree["seconds"], tree["total_bytes"]) == (3, 7260.0, 320_003_000)
    assert tree["layers"][0]["shape"] == [64, 32, 3, 3]


def test_json_of_a_sweep_holds_every_run(lowrank):
    tree = json.loads(lowrank(*SINGLE, "--json", "--sweep", "seed=1,2").out)
    assert [run["seed"] for run in tree["runs"]] == [1, 2]
    assert tree["out"] is None


def test_planning_writes_nothing(lowrank, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lowrank(*SINGLE)
    assert list(tmp_path.iterdir()) == []
