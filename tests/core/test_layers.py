"""Every factorized layer against torch's own layer with the composed weight, and gradcheck in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_core import FactorizedConv2d, FactorizedLinear, FactorizedLSTM, FactorizedWeight, WeightNormLSTM
from lowrank_core.factorizations import Hadamard, Kronecker, LowRank, Svd

pytestmark = pytest.mark.usefixtures("on_device")

FACTORIZATIONS = [LowRank(), Hadamard(), Hadamard(tanh=True), Hadamard(plus_one=True), Svd(), Kronecker()]
CONVOLUTIONS = {
    "plain": {},
    "strided": {"stride": (2, 1)},
    "padded": {"padding": (1, 2)},
    "same": {"padding": "same", "kernel_size": (3, 3)},
    "dilated": {"dilation": (2, 1)},
    "grouped": {"groups": 2},
    "pointwise": {"kernel_size": (1, 1)},
    "pointwise, strided and padded": {"kernel_size": (1, 1), "stride": (2, 2), "padding": (1, 1)},
    "without bias": {"bias": False},
}


def check(layer: nn.Module, *inputs: torch.Tensor) -> None:
    """gradcheck with respect to the inputs and every parameter."""
    names = [name for name, _ in layer.named_parameters()]

    def call(*values: torch.Tensor):
        given = dict(zip(names, values, strict=False))
        output = torch.func.functional_call(layer, given, values[len(names) :])
        return output[0] if isinstance(output, tuple) else output

    # Along a random direction of the inputs and outputs instead of every entry: a tenth of the time.
    torch.autograd.gradcheck(
        call,
        (*[p.detach().requires_grad_() for p in layer.parameters()], *inputs),
        fast_mode=True,
        nondet_tol=1e-12 if inputs[0].is_cuda else 0.0,
    )


@pytest.mark.parametrize("factorization", FACTORIZATIONS, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 9])  # 9: where low-rank composes rather than applies its factors
def test_linear_is_linear_with_the_composed_weight(factorization, rank):
    layer = FactorizedLinear(5, 4, factorization, rank=rank, dtype=torch.float64)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight(), layer.bias))
    check(layer, x)


@pytest.mark.parametrize("factorization", FACTORIZATIONS, ids=str)
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("rank", [2, 6])
def test_conv_is_conv_with_the_composed_weight(factorization, options, rank):
    options = {"kernel_size": (3, 2), **options}
    layer = FactorizedConv2d(4, 6, factorization=factorization, rank=rank, dtype=torch.float64, **options)
    x = torch.randn(1, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    expected = F.conv2d(x, layer.weight(), layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    torch.testing.assert_close(layer(x), expected)
    if rank == 2:
        check(layer, x)


@pytest.mark.parametrize("factorization", FACTORIZATIONS, ids=str)
@pytest.mark.parametrize("kind", [nn.LSTM, WeightNormLSTM])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "batch_first": True}, {"bias": False}], ids=str)
def test_lstm_is_torchs_lstm_with_the_composed_weights(factorization, kind, options):
    source = kind(3, 4, 2, dtype=torch.float64, **options)
    ranks = dict.fromkeys(("weight_ih_l0", "weight_hh_l0", "weight_hh_l1"), 2)
    layer = FactorizedLSTM(source, factorization, ranks=ranks)
    x = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    reference = nn.LSTM(3, 4, 2, dtype=torch.float64, **options)
    state = {}
    for name in reference.state_dict():
        held = getattr(layer, name)
        weight = held() if isinstance(held, FactorizedWeight) else held
        gain = getattr(layer, name.replace("weight", "norm"), None) if "weight" in name else None
        state[name] = weight if gain is None else gain * weight / weight.norm(dim=1, keepdim=True)
    reference.load_state_dict(state)
    output, (h, c) = layer(x)
    expected, (expected_h, expected_c) = reference(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(h, expected_h)
    torch.testing.assert_close(c, expected_c)
    if not options:
        check(layer, x)


def test_weight_norm_leaves_a_fresh_lstm_as_it_is_and_follows_its_gains():
    torch.manual_seed(1)
    plain = nn.LSTM(3, 4)
    torch.manual_seed(1)
    normed = WeightNormLSTM(3, 4)
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(normed(x)[0], plain(x)[0])
    with torch.no_grad():
        normed.norm_ih_l0.mul_(2)
        plain.weight_ih_l0.mul_(2)
    torch.testing.assert_close(normed(x)[0], plain(x)[0])


def test_a_given_lstm_state_is_used():
    layer = FactorizedLSTM(nn.LSTM(3, 4), Hadamard(), ranks={"weight_ih_l0": 1})
    x = torch.randn(5, 2, 3)
    start = (torch.ones(1, 2, 4), torch.ones(1, 2, 4))
    assert not torch.equal(layer(x, start)[0], layer(x)[0])


def test_low_rank_layers_apply_their_factors_without_composing_where_that_is_cheaper(monkeypatch):
    def refuse(self):
        raise AssertionError("composed")

    layer = FactorizedLinear(8, 8, LowRank(), rank=2)
    costly = FactorizedLinear(8, 8, LowRank(), rank=8)
    monkeypatch.setattr(FactorizedWeight, "forward", refuse)
    layer(torch.randn(1, 8))
    with pytest.raises(AssertionError, match="composed"):
        costly(torch.randn(1, 8))


def test_a_rank_below_one_is_refused():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        FactorizedLinear(3, 3, Hadamard(), rank=0)


def test_an_empty_batch_passes_through():
    layer = FactorizedConv2d(3, 4, (3, 3), Hadamard(), rank=2)
    assert layer(torch.empty(0, 3, 8, 8)).shape == (0, 4, 6, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layers_keep_their_dtype(dtype):
    layer = FactorizedLinear(8, 8, Hadamard(), rank=2, dtype=dtype)
    assert layer(torch.randn(2, 8, dtype=dtype)).dtype == dtype
