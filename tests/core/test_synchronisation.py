"""No layer waits for a GPU: forward and backward read nothing back from the device, and send no number to it.

Such a wait costs more than a small layer's arithmetic. On every device the operations that would wait are refused as
they are called; on CUDA torch itself is told to refuse them, which also sees those that happen inside an operation.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from adapter_forms import FORMS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_core import (
    AdaLoRA,
    FactorizedConv2d,
    FactorizedLinear,
    FactorizedLSTM,
    LoHa,
    LoKr,
    LoRA,
    inject,
    patch_peft,
    set_active,
)
from lowrank_core.adapters.config import AdapterConfig
from lowrank_core.adapters.forward import adapted
from lowrank_core.adapters.geometry import Geometry
from lowrank_core.adapters.ways.choice import possible_ways
from lowrank_core.factorizations import Factorization, Hadamard, Kronecker, LowRank, Svd

pytestmark = pytest.mark.usefixtures("on_device")

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense: "reads a number (.item(), .tolist(), float(), bool(), if)",
    aten.lift_fresh: "sends a number to the device (torch.tensor)",
    aten.nonzero: "waits for a number of entries",
    aten.masked_select: "waits for a number of entries",
    aten.equal: "reads an answer (torch.equal)",
    aten._unique2: "waits for a number of entries",
}


class Refusing(TorchDispatchMode):
    """Fails where an operation would wait; backward passes of a CPU included, which run in the same thread."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reason = WAITING.get(func.overloadpacket)
        if func is aten.index.Tensor and any(index is not None and index.dtype == torch.bool for index in args[1]):
            reason = WAITING[aten.nonzero]
        assert reason is None, f"{func} {reason}"
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_waits() -> Iterator[None]:
    on_cuda = torch.get_default_device().type == "cuda"
    if on_cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        with Refusing():
            yield
    finally:
        if on_cuda:
            torch.cuda.set_sync_debug_mode("default")


def step(call: Callable[[], Any], wanted: list[Tensor]) -> None:
    """Forward and backward; once before, because a library's first use may wait."""
    _gradients(call, wanted)
    with nothing_waits():
        _gradients(call, wanted)


def _gradients(call: Callable[[], Any], wanted: list[Tensor]) -> None:
    out = call()
    out = out[0] if isinstance(out, tuple) else out
    torch.autograd.grad(out, wanted, torch.ones_like(out))


def trained(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x * x.sum().item(),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x * torch.tensor(2.0, device=x.device),
        lambda x: x[x > 0],
    ],
)
def test_what_waits_is_noticed(waits: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises((AssertionError, RuntimeError), match=r"number|synchroniz"), nothing_waits():
        waits(torch.ones(3))


class _ReadsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * grads[0].sum().item()


def test_what_waits_in_backward_is_noticed() -> None:
    x = torch.ones(3, requires_grad=True)
    with pytest.raises((AssertionError, RuntimeError), match=r"number|synchroniz"):
        step(lambda: _ReadsInBackward.apply(x), [x])


LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), (2, 3, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2, padding="valid"), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_way_waits(layer: str, name: str, dtype: torch.dtype) -> None:
    make, shape = LAYERS[layer]
    module, form = make().to(dtype).requires_grad_(False), FORMS[name]
    geometry = Geometry.of(module)
    assert geometry is not None
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    factors = {key: torch.randn(size, requires_grad=True) for key, size in form.shapes(geometry, 1).items()}
    for way in (*possible_ways(form, factors, geometry, dtype), None):

        def call(way: Any = way) -> Tensor:
            return adapted(x, module.weight, module.bias, form, factors, 0.7, geometry, way=way)

        step(call, [x, *factors.values()])


METHODS: dict[str, type[AdapterConfig]] = {"lora": LoRA, "loha": LoHa, "lokr": LoKr, "adalora": AdaLoRA}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", LAYERS)
def test_no_adapted_layer_waits(method: str, layer: str) -> None:
    """Plain; with everything that drops; decomposed; and two adapters together."""
    make, shape = LAYERS[layer]
    more: dict[str, Any] = {"target_rank": 1} if method == "adalora" else {}
    fields: dict[str, Any] = {"rank": 2, "target_modules": ["0"], "init_weights": "random", **more}
    model = inject(nn.Sequential(make()), METHODS[method](**fields))
    drops = {"rank_dropout": 0.5, "module_dropout": 0.1, **({} if method in ("loha", "lokr") else {"dropout": 0.1})}
    inject(model, METHODS[method](**fields, **drops), "dropping")
    inject(model, METHODS[method](**fields, weight_decompose="out"), "decomposed")
    x = torch.randn(shape, requires_grad=True)
    for active in (["default"], ["dropping"], ["decomposed"], ["default", "dropping"]):
        set_active(model, active)
        step(lambda: model(x), [x, *trained(model)])


@pytest.mark.parametrize("method", METHODS)
def test_no_patched_layer_of_peft_waits(method: str) -> None:
    from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model

    configs: dict[str, Any] = {
        "lora": lambda: LoraConfig(r=2, target_modules=["0"]),
        "loha": lambda: LoHaConfig(r=2, target_modules=["0"]),
        "lokr": lambda: LoKrConfig(r=2, target_modules=["0"]),
        "adalora": lambda: AdaLoraConfig(init_r=2, target_r=1, total_step=10, target_modules=["0"]),
    }
    for layer in ("linear", "conv"):
        make, shape = LAYERS[layer]
        model = inject_adapter_in_model(configs[method](), nn.Sequential(make()))
        assert patch_peft(model).changed == ("0",)
        x = torch.randn(shape, requires_grad=True)
        step(lambda model=model, x=x: model(x), [x, *trained(model)])


FACTORIZATIONS = [LowRank(), Hadamard(), Hadamard(tanh=True), Hadamard(plus_one=True), Svd(), Kronecker()]


@pytest.mark.parametrize(("factorization", "rank"), list(itertools.product(FACTORIZATIONS, [1, 6])), ids=str)
def test_no_factorized_layer_waits(factorization: Factorization, rank: int) -> None:
    """Of rank 1 low-rank and svd apply their factors, of rank 6 they compose the weight."""
    linear = FactorizedLinear(6, 8, factorization, rank=rank)
    conv = FactorizedConv2d(4, 6, (3, 3), factorization, rank=rank, padding=(1, 1))
    grouped = FactorizedConv2d(4, 6, (3, 3), factorization, rank=rank, groups=2)
    lstm = FactorizedLSTM(nn.LSTM(3, 4), factorization, ranks={"weight_ih_l0": rank, "weight_hh_l0": rank})
    for layer, shape in ((linear, (2, 6)), (conv, (1, 4, 5, 5)), (grouped, (1, 4, 5, 5)), (lstm, (2, 3, 3))):
        x = torch.randn(shape, requires_grad=True)
        step(lambda layer=layer, x=x: layer(x), [x, *trained(layer)])
