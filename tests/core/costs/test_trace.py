"""FLOPs counted from shapes, against torch's own counter."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank_core.costs.trace import CountFlops, flops_of, trace


def counted_by_torch(model: nn.Module, *inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(*inputs)
    return counter.get_total_flops()


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding="same", groups=2),
        nn.BatchNorm2d(8),
        nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
        nn.Conv2d(8, 4, (3, 1), padding="valid", dilation=(2, 1)),
        nn.ConvTranspose2d(4, 4, 2, stride=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


@pytest.mark.parametrize("size", [(1, 3, 32, 32), (3, 3, 33, 31)])
def test_convolutions_count_as_torch_counts_them(size):
    model, x = conv_net().to("meta"), torch.empty(size, device="meta")
    assert trace(model, x).flops == counted_by_torch(model, x)


def test_the_shapes_are_those_of_the_real_computation():
    model, x = conv_net().eval(), torch.zeros(2, 3, 33, 31)
    real: list[tuple[int, ...]] = []
    for layer in model:
        x = layer(x)
        real.append(tuple(x.shape))
    on_meta: list[tuple[int, ...]] = []
    x = torch.empty(2, 3, 33, 31, device="meta")
    with CountFlops(), torch.no_grad():
        for layer in model.to("meta"):
            x = layer(x)
            on_meta.append(tuple(x.shape))
    assert on_meta == real


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.LSTM(6, 5, 2, batch_first=True), (3, 7, 6)),
        (nn.LSTM(6, 5, bidirectional=True), (7, 3, 6)),
        (nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3)), (2, 5)),
    ],
)
def test_sequences_count_as_torch_counts_them(model, shape):
    dtype = torch.int64 if isinstance(model, nn.Sequential) else None
    x = torch.empty(shape, device="meta", dtype=dtype)
    assert trace(model.to("meta"), x).flops == counted_by_torch(model, x)


def test_attention_counts_both_products():
    query, key = torch.empty(2, 4, 10, 8, device="meta"), torch.empty(2, 4, 6, 8, device="meta")
    assert flops_of(lambda: nn.functional.scaled_dot_product_attention(query, key, key)) == 2 * 2 * 2 * 4 * 10 * 6 * 8


def test_multi_head_attention_counts_as_torch_counts_it():
    layer = nn.MultiheadAttention(16, 4, batch_first=True, device="meta")
    x, y = torch.empty(2, 5, 16, device="meta"), torch.empty(2, 7, 16, device="meta")
    with FlopCounterMode(display=False) as counter:
        layer(x, y, y)
    assert flops_of(lambda: layer(x, y, y)) == counter.get_total_flops()


def test_a_layer_used_twice_has_both_its_inputs():
    layer = nn.Linear(4, 4, device="meta")
    cost = trace(nn.Sequential(layer, layer), torch.empty(3, 4, device="meta"))
    assert cost.layers["0"].inputs == ((3, 4), (3, 4))
    assert cost.layers["0"].flops == cost.flops == 2 * 2 * 3 * 16


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Dropout(), nn.Linear(4, 4)).to("meta")
    model[1].eval()
    trace(model, torch.empty(3, 4, device="meta"))
    assert [module.training for module in model.modules()] == [True, True, False]
    assert not model[1]._forward_hooks
    assert not model[1]._forward_pre_hooks
