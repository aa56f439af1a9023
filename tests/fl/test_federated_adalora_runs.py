"""Runs of federated AdaLoRA: what travels and what is kept, a resumed run, the files, and what it does not go with."""

import numpy as np
import pytest
import torch
from made_runs import write_run
from safetensors.torch import load_file
from test_adapters import SMALL, base_names
from test_run import Watcher, rows_of

from lowrank_core import LowrankError, UsageError
from lowrank_fl.clients import examples_of, model_of
from lowrank_fl.infer import load_classifier
from lowrank_fl.load import load_config
from lowrank_fl.paper.match import essence
from lowrank_fl.plan import plan
from lowrank_fl.reporting.groups import group_runs
from lowrank_fl.reporting.read import find_runs
from lowrank_fl.run import resume, run
from lowrank_fl.saved_model import network_of, read_description
from lowrank_fl.state import state_of

pytestmark = pytest.mark.usefixtures("quick")

LAYERS = ["features.0", "features.4", "features.8"]
# Of twelve directions, after rounds 1 to 4: 6 + 6 (1 - t/3)³, rounded down.
BUDGETS = [7, 6, 6, 6]


def config(*more: str):
    adapted = ["adapter.method=adalora", "adapter.rank=4", "adapter.alpha=3", "adapter.warmup=0", "adapter.settle=0.25"]
    return load_config("quickstart", [*SMALL, "rounds=4", *adapted, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adalora") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowrank_fl.one_run.write_report", lambda out, summaries: None)
        (summary,) = run(config("data.max_examples=600", "federation.epochs=3"), folder, Watcher())
    return folder, summary


@pytest.mark.slow
def test_a_run_ends_at_its_budget_and_says_what_it_sent(finished):
    folder, summary = finished
    rows = rows_of(folder)
    assert [row["rank"] for row in rows] == BUDGETS
    assert all(list(row["layer_ranks"]) == LAYERS and sum(row["layer_ranks"].values()) == row["rank"] for row in rows)
    for way in ("uplink_bytes", "downlink_bytes"):
        first, second, third, fourth = (row[way] for row in rows)
        assert first > second > third == fourth
    saved = load_file(folder / "model.safetensors")
    assert summary.params == sum(tensor.numel() for tensor in saved.values())
    held = load_file(folder / "checkpoint" / "state.safetensors")
    assert summary.transferred_params == sum(t.numel() for name, t in held.items() if name.startswith("model/"))
    assert held["ranks/scores"].shape == (BUDGETS[-1],)
    for layer, rank in rows[-1]["layer_ranks"].items():
        assert saved[f"{layer}.adapters.default.lora_E"].shape == (rank, 1)


@pytest.mark.slow
def test_the_adapter_learns(finished):
    """Importance is of steps that were taken: no value of a direction that is left stays at zero."""
    saved = load_file(finished[0] / "model.safetensors")
    values = torch.cat([saved[f"{layer}.adapters.default.lora_E"].flatten() for layer in LAYERS])
    assert (values.abs() > 1e-4).all()


def test_frozen_weights_stay_as_they_were(finished):
    folder, _ = finished
    settings = load_config(str(folder / "config.yaml"))
    model, _ = model_of(settings, examples_of(settings))
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(saved[name], state_of(model)[name]) for name in base_names(model))


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("codec.up=int8", "codec.down=fp16"), ("partition.held_out=0.2",)])
def test_a_plan_comes_near_what_a_run_sends(more, tmp_path):
    """It shares ranks out evenly, and a run does not."""
    (summary,) = run(config(*more), tmp_path / "run", Watcher())
    (planned,) = plan(config(*more)).runs
    for name in ("uplink_bytes", "downlink_bytes", "evaluation_bytes"):
        assert getattr(planned, name) == pytest.approx(getattr(summary, name), rel=0.1)
    assert planned.model_bytes == 4 * planned.transferred_params
    layers = {entry.name: entry.rank for entry in planned.layers}
    assert layers == dict.fromkeys(LAYERS, 4)


@pytest.mark.slow
def test_a_plan_is_exact_where_ranks_do_fall_evenly(tmp_path, monkeypatch):
    from lowrank_fl.ranks import allocation

    monkeypatch.setattr(
        allocation,
        "allocate",
        lambda scores, budget: [
            [torch.arange(len(one)) < budget // 3 + (number < budget % 3)] for number, (one,) in enumerate(scores)
        ],
    )
    settings = config("partition.held_out=0.2")
    (summary,) = run(settings, tmp_path / "run", Watcher())
    (planned,) = plan(settings).runs
    assert (planned.params, planned.transferred_params) == (summary.params, summary.transferred_params)
    for name in ("uplink_bytes", "downlink_bytes", "evaluation_bytes"):
        assert getattr(planned, name) == pytest.approx(getattr(summary, name), rel=1e-3, abs=20)


def test_a_plan_counts_the_arrays_of_every_round():
    (fixed,), (falling,) = (plan(config(f"adapter.target_rank={target}")).runs for target in (4, 2))
    directions = 9 + 8 + 1, 72 + 16 + 1, 144 + 32 + 1
    whole = fixed.model_bytes
    assert fixed.paper_bytes == 2 * 2 * 4 * whole
    # Rounds with 12, 7, 6 and 6 directions: four on each layer, then three, two and two, then two on each.
    lost = [0, 4 * (directions[0] + 2 * directions[1] + 2 * directions[2]), *2 * [4 * 2 * sum(directions)]]
    assert falling.paper_bytes == 2 * 2 * sum(whole - less for less in lost)
    assert falling.flops_per_round < fixed.flops_per_round


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("codec.up=int8", "codec.down=int8", "strategy.name=fedprox")])
@pytest.mark.parametrize("after", [1, 3])
def test_a_run_that_was_stopped_ends_with_the_same_bits(after, more, tmp_path):
    given = ("partition.held_out=0.2", "personalization.kind=fedper", "federation.momentum=0.5", *more)
    run(config(*given), tmp_path / "whole", Watcher())
    with pytest.raises(LowrankError, match="interrupted"):
        run(config(*given), tmp_path / "stopped", Watcher(interrupt_after=after))
    assert rows_of(tmp_path / "stopped")[-1]["rank"] == BUDGETS[after - 1]
    resume(tmp_path / "stopped", Watcher())
    rows = [[{**row, "seconds": 0} for row in rows_of(tmp_path / name)] for name in ("whole", "stopped")]
    assert rows[0] == rows[1]
    for name in ("model.safetensors", "checkpoint/state.safetensors", "adapter/adapter_model.safetensors"):
        whole, stopped = (load_file(tmp_path / run / name) for run in ("whole", "stopped"))
        assert whole.keys() == stopped.keys()
        assert all(torch.equal(tensor, stopped[key]) for key, tensor in whole.items())


@pytest.mark.slow
def test_rounds_are_not_changed_on_the_way(tmp_path):
    with pytest.raises(LowrankError, match="interrupted"):
        run(config(), tmp_path / "run", Watcher(interrupt_after=1))
    with pytest.raises(UsageError) as caught:
        resume(tmp_path / "run", Watcher(), ["rounds=8"])
    assert str(caught.value) == (
        "--resume takes -o for rounds, federation.tolerated_failures and engine.* but engine.threads and "
        "engine.execution, and rounds is what the schedule of AdaLoRA's ranks is in shares of; leave it out, or start "
        "a new run"
    )
    written = tmp_path / "run" / "config.yaml"
    written.write_text(written.read_text().replace("rounds: 4", "rounds: 8"))
    with pytest.raises(LowrankError, match="left by a run with another configuration"):
        resume(tmp_path / "run", Watcher())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fedper", "fedrep", "finetune"])
def test_personalised_models_that_share_the_adapter(kind, tmp_path):
    settings = config("partition.held_out=0.2", f"personalization.kind={kind}")
    run(settings, tmp_path / "run", Watcher())
    rows = rows_of(tmp_path / "run")
    assert [row["rank"] for row in rows] == BUDGETS
    assert rows[0]["evaluation_bytes"] > rows[-1]["evaluation_bytes"]
    client = None if kind == "finetune" else rows[-1]["clients"][0]
    assert load_classifier(tmp_path / "run", client).classes == tuple("0123456789")


# Afterwards.


def test_infer_and_a_later_run_take_the_model(finished, tmp_path):
    folder, summary = finished
    examples = examples_of(config())
    classifier = load_classifier(folder)
    inputs = examples.normalize(examples.test_inputs)
    logits = classifier.model(inputs)
    assert (logits.argmax(1) == examples.test_labels).double().mean().item() == pytest.approx(summary.accuracy)
    again, _ = model_of(config(f"model.start={folder}", "adapter.method=null"), examples)
    torch.testing.assert_close(again.eval()(inputs), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*`r` is not used in AdaLora")
@pytest.mark.filterwarnings("ignore:.*rank_pattern keys did not match")
@pytest.mark.parametrize("emptied", [[], LAYERS[:1]])
def test_peft_puts_the_adapter_on_the_base(emptied, finished, tmp_path):
    peft = pytest.importorskip("peft")
    from lowrank_fl.models.adapted import write_adapter
    from lowrank_fl.saved_model import fill

    folder, _ = finished
    settings = load_config(str(folder / "config.yaml"))
    saved = load_file(folder / "model.safetensors")
    adapter = folder / "adapter"
    model = network_of(folder, read_description(folder))
    for layer in emptied:
        for leaf, cut in (("lora_A", np.s_[:0]), ("lora_E", np.s_[:0]), ("lora_B", np.s_[:, :0])):
            name = f"{layer}.adapters.default.{leaf}"
            saved[name] = saved[name][cut]
    fill(folder, model, saved)
    if emptied:
        adapter = tmp_path / "adapter"
        write_adapter(model, "cnn", settings.adapter, adapter)
    examples = examples_of(settings)
    inputs = examples.normalize(examples.test_inputs)
    base, _ = model_of(settings.model_copy(update={"adapter": config("adapter.method=null").adapter}), examples)
    before = base.eval()(inputs)
    loaded = peft.PeftModel.from_pretrained(base, adapter).eval()
    torch.testing.assert_close(loaded(inputs), model.eval()(inputs), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(loaded(inputs), before, atol=0.01)
    kept = loaded.peft_config["default"].rank_pattern
    ranks = dict(rows_of(folder)[-1]["layer_ranks"])
    assert {name: sum(mask) for name, mask in kept.items()} == {
        f"{layer}.lora_E": 1 if layer in emptied else max(1, ranks[layer]) for layer in LAYERS
    }


# In reports.


def test_keys_of_the_fall_count_only_where_ranks_fall():
    assert essence(config()) == essence(config("adapter.target_rank=2"))
    assert essence(config()) != essence(config("adapter.target_rank=1"))
    lora = [essence(config("adapter.method=lora", f"adapter.target_rank={rank}")) for rank in (1, 2)]
    assert lora[0] == lora[1]


def test_a_report_names_both_ranks(tmp_path):
    own = {"a": "adapter.method=lora", "b": "adapter.target_rank=null", "c": "adapter.target_rank=3"}
    for name, given in own.items():
        adapted = ["model.method=original", "adapter.method=adalora", "adapter.rank=7", given]
        write_run(tmp_path / name, "mnist", *adapted)
    labels = [group.label for group in group_runs(find_runs([tmp_path]).runs)]
    assert labels == ["lora, rank 7", "adalora, rank 7 to 4", "adalora, rank 7 to 3"]


# What it does not go with.


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["strategy.name=scaffold"],
            "strategy.name scaffold does not go with adapter.method adalora, under which arrays shrink from round to "
            "round and clients' importances are averaged by examples; use fedavg or fedprox",
        ),
        (
            ["codec.down=topk"],
            "codec.down topk remembers numbers by their places in the model, and under adapter.method adalora these "
            "change as ranks fall; use none, fp16 or int8",
        ),
        (
            ["personalization.kind=ditto", "partition.held_out=0.2"],
            "personalization.kind ditto gives each client an adapter of its own, whose ranks the server cannot "
            "allocate; use another kind, or an adapter.method other than adalora",
        ),
        (
            ["adapter.target_rank=5"],
            "target_rank is 5, above the rank of 4 that layers start with; lower target_rank or raise rank",
        ),
        (
            ["adapter.warmup=0.5", "adapter.settle=0.5"],
            "warmup and settle are shares of the rounds that leave some of them, got 0.5 and 0.5; lower one of them",
        ),
    ],
)
def test_what_it_does_not_go_with(more, said):
    with pytest.raises(UsageError) as caught:
        config(*more)
    assert said in str(caught.value)


def test_a_run_too_short_for_the_fall_leaves_no_folder(tmp_path):
    with pytest.raises(UsageError, match=r"adapter\.method adalora: of 2 rounds, 1 to settle leave only the first"):
        run(config("rounds=2", "adapter.settle=0.5"), tmp_path / "run", Watcher())
    assert not (tmp_path / "run" / "config.yaml").exists()
