"""Adapted layers: against the plain formula in float64, against PEFT, and in every precision."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_core import AdaLoRA, AdaptedLayer, LoHa, LoKr, LoRA, inject, set_active
from lowrank_core.adapters.config import AdapterConfig

pytestmark = pytest.mark.usefixtures("on_device")


class Conv1D(nn.Module):
    """transformers' layer in its own words: a Linear that stores its weight the other way round."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


LAYERS: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(12, 8), lambda: torch.randn(2, 3, 12)),
    "linear without bias": (lambda: nn.Linear(6, 10, bias=False), lambda: torch.randn(5, 6)),
    "transposed": (lambda: Conv1D(8, 12), lambda: torch.randn(2, 12)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), lambda: torch.randn(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), dilation=2, padding="same"), lambda: torch.randn(2, 4, 7, 7)),
    "conv2d grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4, stride=2), lambda: torch.randn(2, 8, 7, 7)),
    "conv2d pointwise": (lambda: nn.Conv2d(4, 6, 1), lambda: torch.randn(2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, padding="valid"), lambda: torch.randn(1, 4, 3, 4, 5)),
}
METHODS: dict[str, type[AdapterConfig]] = {"lora": LoRA, "loha": LoHa, "lokr": LoKr, "adalora": AdaLoRA}
CASES = [
    pytest.param(method, layer, tucker, id=f"{method}-{layer}" + ("-tucker" if tucker else ""))
    for method in METHODS
    for layer in LAYERS
    for tucker in (False, True)
    if not tucker or ("conv" in layer and "pointwise" not in layer and method != "adalora")
]


def config(method: str, **fields: Any) -> AdapterConfig:
    if method == "adalora":
        fields["target_rank"] = 1
    return METHODS[method](**{"rank": 2, "alpha": 3, "target_modules": ["0"], "init_weights": "random", **fields})


def adapted(layer: nn.Module, wanted: AdapterConfig, **options: Any) -> AdaptedLayer:
    model = inject(nn.Sequential(layer), wanted, **options)
    assert isinstance(model[0], AdaptedLayer)
    return model[0]


def by_formula(layer: AdaptedLayer, x: Tensor) -> Tensor:
    """The base layer with W + Σ weight · scaling · ΔW as its weight."""
    weight = layer.base.weight.detach()
    for name in layer.active:
        adapter = layer.adapter(name)
        change = adapter.weight * adapter.scaling * adapter.form.compose(adapter.factors, layer.geometry)
        weight = weight + layer.geometry.as_stored(change)
    return torch.func.functional_call(layer.base, {"weight": weight}, x)


@pytest.mark.parametrize(("method", "kind", "tucker"), CASES)
def test_output_and_gradients_are_those_of_the_changed_weight(method: str, kind: str, tucker: bool) -> None:
    make, sample = LAYERS[kind]
    fields = {"tucker": True} if tucker else {}
    layer = adapted(make().double(), config(method, **fields))
    x = sample().double().requires_grad_()
    parameters = [p for p in layer.parameters() if p.requires_grad]
    assert {p.dtype for p in parameters} == {torch.float64}
    assert len(parameters) == len(layer.adapter("default").factors)
    for out in (layer(x), layer.base(x) + layer.adapter("default")(x, layer.base)):
        expected = by_formula(layer, x)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        direction = torch.randn_like(out)
        ours = torch.autograd.grad(out, [x, *parameters], direction)
        plain = torch.autograd.grad(expected, [x, *parameters], direction)
        for our, one in zip(ours, plain, strict=True):
            torch.testing.assert_close(our, one, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_convolutions_take_an_example_without_a_batch(method: str) -> None:
    for layer in (nn.Conv2d(4, 6, 1), nn.Conv1d(4, 6, 3)):
        wrapped = adapted(layer.double(), config(method))
        x = torch.randn(4, *(5,) * len(wrapped.geometry.kernel), dtype=torch.float64, requires_grad=True)
        torch.testing.assert_close(wrapped(x), by_formula(wrapped, x))
        wrapped(x).sum().backward()


@pytest.mark.parametrize("method", METHODS)
def test_a_new_adapter_changes_nothing(method: str) -> None:
    base = nn.Conv2d(4, 6, 3)
    x = torch.randn(2, 4, 5, 5)
    expected = base(x)
    for init in ("peft", "lycoris"):
        layer = adapted(base, config(method, init_weights=init))
        torch.testing.assert_close(layer(x), expected)
        assert layer.adapter("default").compose().count_nonzero() == 0


def test_embedding_keeps_what_the_base_does() -> None:
    ids = torch.tensor([[0, 3, 3], [5, 1, 0]])
    plain = adapted(nn.Embedding(7, 4), config("lora"))
    torch.testing.assert_close(plain(ids), by_formula(plain, ids))
    padded = adapted(nn.Embedding(7, 4, padding_idx=0, max_norm=0.5), config("lora"))
    out = padded(ids)
    torch.testing.assert_close(
        out, padded.base(ids) + nn.functional.embedding(ids, padded.adapter("default").compose().T)
    )
    assert padded.base.weight[[1, 3, 5]].norm(dim=1).max() < 0.5001  # the base is called, and rescales its rows
    out.sum().backward()
    gradient = padded.adapter("default").lora_embedding_A.grad
    assert gradient[:, 0].count_nonzero() == 0  # padding is not trained
    assert gradient[:, 3].count_nonzero() > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_keeps_the_dtype_of_a_narrow_base(method: str, dtype: torch.dtype) -> None:
    for kind in ("linear", "conv2d"):
        make, sample = LAYERS[kind]
        layer = adapted(make().to(dtype), config(method))
        exact = adapted(make().double(), config(method))
        exact.load_state_dict(layer.state_dict())
        x = sample().to(dtype)
        out = layer(x)
        assert {p.dtype for p in layer.adapter("default").parameters()} == {torch.float32}
        assert out.dtype == dtype
        reference = exact(x.double())
        assert (out.double() - reference).norm() < 8 * torch.finfo(dtype).eps * reference.norm()
        out.sum().backward()
        narrow = adapted(make().to(dtype), config(method), dtype=dtype)
        assert {p.dtype for p in narrow.adapter("default").parameters()} == {dtype}
        assert narrow(x).dtype == dtype


@pytest.mark.parametrize("decompose", [None, "out"])
@pytest.mark.parametrize("method", METHODS)
def test_autocast(method: str, decompose: Any, device: torch.device) -> None:
    for kind in ("linear", "conv2d"):
        make, sample = LAYERS[kind]
        layer = adapted(make(), config(method, weight_decompose=decompose))
        x = sample()
        expected = layer(x)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            out = layer(x)
        assert out.dtype == torch.bfloat16
        assert (out.float() - expected).norm() < 0.03 * expected.norm()
        out.sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.adapter("default").parameters())


def test_embedding_under_autocast_keeps_the_bases_dtype(device: torch.device) -> None:
    layer = adapted(nn.Embedding(7, 4, dtype=torch.bfloat16), config("lora"))
    assert layer(torch.tensor([1, 2])).dtype == torch.bfloat16
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert layer(torch.tensor([1, 2])).dtype == torch.bfloat16


def test_attributes_fall_through_to_the_base() -> None:
    base = nn.Conv2d(4, 6, 3, stride=2)
    layer = adapted(base, config("lora"))
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert (layer.in_channels, layer.stride, layer.padding_mode) == (4, (2, 2), "zeros")
    with pytest.raises(AttributeError, match="nonsense"):
        _ = layer.nonsense


def test_a_base_with_hooks_or_a_forward_of_its_own_is_called() -> None:
    calls: list[str] = []
    base = nn.Linear(3, 3)
    layer = adapted(base, config("lora"))
    x = torch.randn(2, 3)
    expected = layer(x)
    hook = base.register_forward_hook(lambda *_: calls.append("hook"))
    torch.testing.assert_close(layer(x), expected)
    hook.remove()
    original = base.forward
    base.forward = lambda x: calls.append("forward") or original(x)  # as libraries do that offload weights
    torch.testing.assert_close(layer(x), expected)
    assert calls == ["hook", "forward"]


@pytest.mark.parametrize("kind", ["linear", "conv2d grouped"])
def test_rank_dropout_drops_whole_outputs_of_the_change(kind: str) -> None:
    make, sample = LAYERS[kind]
    if kind == "linear":
        make = lambda: nn.Linear(12, 32)  # noqa: E731 - of 32 outputs some are dropped and some kept by any generator
    x = sample()
    for method, fields, rescaled in (
        ("loha", {}, True),
        ("lokr", {"rank_dropout_scale": True}, True),
        ("lokr", {}, False),
        ("lora", {}, False),
    ):
        layer = adapted(make(), config(method, rank_dropout=0.5, **fields))
        change = (layer(x) - layer.base(x)).transpose(0, 1 if kind != "linear" else -1).flatten(1)
        whole = (layer.eval()(x) - layer.base(x)).transpose(0, 1 if kind != "linear" else -1).flatten(1)
        share = (change * whole).sum(1) / (whole * whole).sum(1)
        kept = share > 0.5
        assert 0 < kept.sum() < len(kept)
        assert torch.allclose(share[~kept], torch.zeros(()), atol=1e-4)
        factor = len(kept) / float(kept.sum()) if rescaled else 1.0
        assert torch.allclose(share[kept], torch.tensor(factor), atol=1e-3)


def test_rank_dropout_that_drops_everything_gives_no_nan() -> None:
    layer = adapted(nn.Linear(3, 2), config("loha", rank_dropout=0.999))
    x = torch.randn(4, 3)
    torch.testing.assert_close(layer(x), layer.base(x))


def test_module_dropout_drops_the_adapter_and_keeps_its_gradients() -> None:
    layer = adapted(nn.Linear(3, 4), config("lokr", module_dropout=0.5))
    x = torch.randn(2, 3)
    dropped = [torch.equal(layer(x), layer.base(x)) for _ in range(40)]
    assert 5 < sum(dropped) < 35
    for _ in range(10):
        layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.adapter("default").parameters())
    assert not torch.equal(layer.eval()(x), layer.base(x))


def test_dropout_is_of_the_adapters_input_alone() -> None:
    layer = adapted(nn.Linear(64, 4).double(), config("lora", dropout=0.5))
    x = torch.randn(2, 64, dtype=torch.float64)
    torch.manual_seed(1)
    out = layer(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    delta = layer.adapter("default").compose()
    torch.testing.assert_close(out, layer.base(x) + dropped @ delta.T)
    torch.testing.assert_close(layer.eval()(x), layer.base(x) + x @ delta.T)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_traces_without_breaks(method: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 5), nn.Linear(5, 6))
    inject(model, config(method, target_modules=["0", "2"], rank_dropout=0.5, module_dropout=0.1, dropout=0.1))
    inject(model, config(method, target_modules=["2", "3"], weight_decompose="out"), "second")
    x = torch.randn(2, 3, 5, 5)
    for active in (["default"], ["second"], ["default", "second"]):
        set_active(model, active)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        compiled(x).sum().backward()
        model.eval()
        torch.testing.assert_close(compiled(x), model(x))
        model.train()
