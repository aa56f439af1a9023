"""Removing directions: the same training as with masks, every optimizer's state, and graphs that are still alive."""

import pytest
import torch
from adaptive_models import Products, Triplets, loss_of, small_model, train, trained
from torch import nn

from lowrank_core.adaptive import AdaptiveRank, adapt_ranks
from lowrank_core.adaptive.resizing import keep_directions, state_dims
from lowrank_core.errors import LowrankError

pytestmark = pytest.mark.usefixtures("on_device")


def run(layer, shrink, optimizer, **options):
    torch.manual_seed(5)
    model = small_model(layer=layer, dtype=torch.float64)
    optimizer = optimizer(trained(model), lr=0.005, **options)
    config = AdaptiveRank(target_rank=2, warmup=0.1, settle=0.5, orthogonality=0, shrink=shrink)
    allocator = adapt_ranks(optimizer, model, 30, config)
    train(model, optimizer, range(30), torch.float64)
    return model, allocator


@pytest.mark.parametrize("layer", [Triplets, Products])
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"amsgrad": True, "foreach": True}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
        (torch.optim.NAdam, {}),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else "+".join(v),
)
def test_training_goes_on_as_if_the_removed_directions_were_still_there_and_zero(layer, optimizer, options):
    (small, first), (whole, second) = (run(layer, shrink, optimizer, **options) for shrink in (True, False))
    assert first.rank_pattern() == second.rank_pattern()
    assert sum(p.numel() for p in trained(small)) < sum(p.numel() for p in trained(whole))
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(small(x), whole(x), rtol=1e-9, atol=1e-12)


def test_a_loss_that_is_still_alive_does_not_hold_the_old_shape():
    # PEFT gave up resizing while training because of this.
    model = nn.Sequential(Triplets(6, 3, 4))
    optimizer = torch.optim.Adam(trained(model), lr=0.1)
    old = loss_of(model, 0)
    old.backward()
    optimizer.step()
    keep_directions(model[0].lora_A, 0, torch.tensor([0, 3]), optimizer)
    keep_directions(model[0].lora_E, 0, torch.tensor([0, 3]), optimizer)
    keep_directions(model[0].lora_B, 1, torch.tensor([0, 3]), optimizer)
    optimizer.zero_grad()
    before = model[0].lora_A.detach().clone()
    loss_of(model, 1).backward()
    optimizer.step()
    assert model[0].lora_A.grad.shape == (2, 6)
    assert not torch.equal(model[0].lora_A, before)
    assert old.item() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_data_gradient_and_state_are_cut_alike_and_the_parameter_is_the_same_object(dtype):
    parameter = nn.Parameter(torch.randn(3, 5, dtype=dtype))
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    expected = [
        t[:, [1, 4]].clone()
        for t in (parameter.detach(), parameter.grad, *map(optimizer.state[parameter].get, ("exp_avg", "exp_avg_sq")))
    ]
    keep_directions(parameter, 1, torch.tensor([1, 4]), optimizer)
    found = [parameter, parameter.grad, optimizer.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg_sq"]]
    assert optimizer.param_groups[0]["params"][0] is parameter
    assert parameter.dtype == dtype
    assert parameter.requires_grad
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_a_parameters_hooks_and_a_scheduler_go_on():
    model = small_model()
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    seen = []
    model[0].lora_A.register_post_accumulate_grad_hook(lambda p: seen.append(tuple(p.grad.shape)))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    adapt_ranks(optimizer, model, 4, AdaptiveRank(target_rank=1, warmup=0, settle=0.5))
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        scheduler.step()
    assert seen[0] == (4, 6)
    assert seen[-1] == tuple(model[0].lora_A.shape) != (4, 6)
    assert optimizer.param_groups[0]["lr"] == 0.1 / 16


@pytest.mark.parametrize(
    ("shape", "dim", "state", "expected"),
    [
        ((4, 6), 0, {"step": torch.tensor(3.0), "exp_avg": torch.ones(4, 6), "n": 3, "nothing": None}, {"exp_avg": 0}),
        ((6, 4), 1, {"row_var": torch.ones(6, 1), "col_var": torch.ones(1, 4)}, {"col_var": 1}),
        ((4, 6), 0, {"exp_avg_sq_row": torch.ones(4), "exp_avg_sq_col": torch.ones(6)}, {"exp_avg_sq_row": 0}),
        ((6, 4), 1, {"exp_avg_sq_row": torch.ones(6), "exp_avg_sq_col": torch.ones(4)}, {"exp_avg_sq_col": 0}),
        ((4,), 0, {"step": torch.ones(1), "momentum_buffer": torch.ones(4)}, {"momentum_buffer": 0}),
    ],
)
def test_states_of_known_layouts_are_told_apart(shape, dim, state, expected):
    found = state_dims(torch.ones(shape), dim, state)
    assert {key: along for key, along in found.items() if along is not None} == expected


def test_transformers_adafactor_is_cut():
    from transformers.optimization import Adafactor

    parameter = nn.Parameter(torch.randn(4, 6))
    optimizer = Adafactor([parameter], lr=0.1, relative_step=False, scale_parameter=False)
    parameter.grad = torch.randn(4, 6)
    optimizer.step()
    row = optimizer.state[parameter]["exp_avg_sq_row"].clone()
    keep_directions(parameter, 0, torch.tensor([2, 3]), optimizer)
    assert torch.equal(optimizer.state[parameter]["exp_avg_sq_row"], row[2:])
    optimizer.step()


@pytest.mark.parametrize("bad", [torch.ones(24), torch.ones(4, 7), [torch.ones(4, 6)], torch.ones(2, 4, 6)], ids=str)
def test_a_state_of_another_layout_is_refused_and_nothing_is_changed(bad):
    parameter = nn.Parameter(torch.randn(4, 6))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter] = {"exp_avg": torch.ones(4, 6), "flat": bad}
    with pytest.raises(
        LowrankError, match=r"the optimizer's flat for a parameter of shape .* does not tell directions apart"
    ):
        keep_directions(parameter, 0, torch.tensor([1]), optimizer)
    assert parameter.shape == optimizer.state[parameter]["exp_avg"].shape == (4, 6)
