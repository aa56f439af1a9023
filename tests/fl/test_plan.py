"""What a plan counts and times; that it costs what the run then costs is tested with runs."""

import json

import pytest

from lowrank_fl.clients import examples_of
from lowrank_fl.load import load_config
from lowrank_fl.plan import plan
from lowrank_fl.plan.shapes import SHAPES, data_shape


@pytest.mark.slow
def test_a_plan_counts_every_step_of_an_lstm(tmp_path):
    """To the counter the fused LSTM of CPUs is one operation, of no known cost."""
    path = tmp_path / "roles.jsonl"
    path.write_text(json.dumps({"play": "p", "role": "r", "text": "To be, or not to be. " * 40}))
    federation = ["federation.clients=2", "federation.clients_per_round=2", "federation.epochs=1"]
    model = ["model.name=lstm", "model.method=original"]
    config = load_config("quickstart", ["data.name=shakespeare", f"data.path={path}", *federation, *model])
    # 80 characters through layers of 8 and 256 inputs, 256 units and 4 gates; then a symbol of each example.
    examples = examples_of(config)
    forward = 2 * (80 * 4 * 256 * (8 + 256 + 256 + 256) + 256 * len(examples.classes))
    (cost,) = plan(config).runs
    # The first step's state needs no gradient.
    assert 0.99 * 3 * forward < cost.flops_per_round / len(examples.labels) < 3 * forward


@pytest.mark.slow
def test_an_expensive_step_is_timed_on_fewer_examples(monkeypatch):
    monkeypatch.setattr("lowrank_fl.plan.work._TIMED_FLOPS", 1)
    (cost,) = plan(load_config("quickstart", ["model.name=mlp", "model.method=fedpara"])).runs
    assert cost.seconds > 0


def test_the_known_number_of_test_examples_is_the_loaders():
    assert SHAPES["digits"].test_examples == len(examples_of(load_config("quickstart")).test_labels)


def test_the_known_shape_of_the_plays_is_the_loaders(shared_data):
    path = shared_data / "shakespeare"
    whole = load_config("shakespeare-iid", [f"data.path={path}", "partition.kind=natural"])
    examples = examples_of(whole)
    known = SHAPES["shakespeare"]
    assert (known.input_shape, known.classes) == (examples.input_shape, len(examples.classes))
    assert (known.examples, known.test_examples) == (len(examples.labels), len(examples.test_labels))
    assert known.makers == len(set(examples.groups))


def test_a_natural_partition_leaves_most_makers_out(tmp_path):
    path = tmp_path / "roles.jsonl"
    lines = [json.dumps({"play": "p", "role": f"{number}", "text": "To be. " * 80}) + "\n" for number in range(6)]
    path.write_text("".join(lines))
    config = load_config("shakespeare-small", [f"data.path={path}", "federation.clients=4"])
    whole = len(examples_of(config).labels)
    assert data_shape(config).examples == whole * 4 // 6
    assert data_shape(load_config("shakespeare-small", ["data.max_test_examples=7"])).test_examples == 7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "transferred", "biases"),
    # 63,646 is the paper's; at γ = 0.5 its two layers have ranks 56 and 16, 56 and 4 with ten classes.
    [("femnist", 63_646, 256 + 62), ("femnist-20", 63_646, 256 + 62), ("mnist-2class", 59_570, 256 + 10)],
)
def test_personalised_presets_are_planned_without_their_data(preset, transferred, biases):
    (cost,) = plan(load_config(preset)).runs
    # Of the factors the half that is W1's travels.
    assert (cost.transferred_params, cost.params) == (transferred, 2 * transferred - biases)
    assert cost.seconds > 0


@pytest.mark.slow
def test_the_papers_lstm_is_planned_without_its_data():
    (cost,) = plan(load_config("shakespeare-noniid")).runs
    # Table 11 prints 0.19.
    assert cost.params / cost.original_params == pytest.approx(0.19, abs=0.005)
