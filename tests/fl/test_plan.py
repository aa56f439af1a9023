"""What a plan counts and times; that it costs what the run then costs is tested with runs."""

import json

from lowrank_fl.clients import examples_of
from lowrank_fl.load import load_config
from lowrank_fl.plan import _SHAPES, plan


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


def test_an_expensive_step_is_timed_on_fewer_examples(monkeypatch):
    monkeypatch.setattr("lowrank_fl.plan._TIMED_FLOPS", 1)
    (cost,) = plan(load_config("quickstart", ["model.name=mlp", "model.method=fedpara"])).runs
    assert cost.seconds > 0


def test_the_known_number_of_test_examples_is_the_loaders():
    assert _SHAPES["digits"].test_examples == len(examples_of(load_config("quickstart")).test_labels)
