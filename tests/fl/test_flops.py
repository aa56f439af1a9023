"""FLOPs against torch's own counter."""

import pytest
import torch

from lowrank_fl.config import ModelConfig
from lowrank_fl.flops import CountFlops
from lowrank_fl.models.build import build_model
from lowrank_fl.steps import backward


@pytest.mark.slow
@pytest.mark.parametrize("method", ["original", "fedpara"])
@pytest.mark.parametrize(("name", "shape"), [("cnn", (3, 16, 16)), ("mlp", (1, 8, 8)), ("lstm", (5,))])
def test_the_count_is_that_of_torchs_counter(name, shape, method):
    from torch.utils.flop_counter import FlopCounterMode

    model, _ = build_model(ModelConfig(name=name, method=method, width=8, tanh=True), shape, 10, seed=0)
    inputs = torch.zeros(3, *shape) if len(shape) > 1 else torch.zeros(3, *shape, dtype=torch.int64)
    strength = 1.0 if method == "fedpara" else 0.0
    with torch.device("meta"), CountFlops() as ours, FlopCounterMode(display=False) as theirs:
        backward(model.to("meta"), inputs.to("meta"), torch.zeros(3, dtype=torch.int64), 0.1, strength)
    assert ours.total == theirs.get_total_flops() > 0
