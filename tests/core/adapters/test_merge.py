"""Merging: one rounding of the exact sum, a report of what it lost, and the very bits back."""

import copy
import pickle
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_core import (
    AdaLoRA,
    LoHa,
    LoKr,
    LoRA,
    LowrankError,
    MergeReport,
    UsageError,
    disable,
    inject,
    load_state_dict_into,
    merge,
    remove,
    set_active,
    set_scale,
    state_dict_of,
    unmerge,
)
from lowrank_core.adapters.config import AdapterConfig
from lowrank_core.adapters.merge import round_once


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.linear = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 9, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.linear(self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)))


IDS = torch.tensor([[1, 5, 0], [7, 7, 8]])
LAYERS = ["conv", "linear", "lm_head"]
FIELDS: dict[str, Any] = {"rank": 2, "alpha": 5, "init_weights": "random"}
CONFIGS: dict[str, AdapterConfig] = {
    "lora": LoRA(target_modules=["embed", *LAYERS], **FIELDS),
    "loha": LoHa(target_modules=LAYERS, **FIELDS),
    "loha tucker": LoHa(target_modules=LAYERS, tucker=True, **FIELDS),
    "lokr": LoKr(target_modules=LAYERS, **FIELDS),
    "adalora": AdaLoRA(target_modules=LAYERS, target_rank=1, **FIELDS),
    "rank stabilized": LoRA(target_modules=LAYERS, rank_stabilized=True, **FIELDS),
}


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone().view(torch.uint8) for key, value in model.state_dict().items()}


def exact_weight(layer: Any) -> Tensor:
    """W + Σ weight · scaling · ΔW in float64, as the layer stores it."""
    total = layer.base.weight.detach().double()
    for name in layer.active:
        adapter = layer.adapter(name)
        factors = {key: factor.detach().double() for key, factor in adapter.factors.items()}
        change = adapter.form.compose(factors, layer.geometry)
        total = total + adapter.weight * adapter.scaling * layer.geometry.as_stored(change)
    return total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", CONFIGS)
def test_merged_weight_is_the_exact_sum_rounded_once_and_unmerge_restores_the_bits(
    method: str, dtype: torch.dtype
) -> None:
    model = inject(Model().to(dtype), CONFIGS[method], "a")
    inject(model, LoRA(target_modules=["linear"], **FIELDS), "b")
    set_active(model, ["a", "b"], [0.7, 1.5])
    out, before = model(IDS), bits(model)
    parameters = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    expected = {name: exact_weight(model.get_submodule(name)) for name in ("conv", "linear", "lm_head")}
    report = merge(model)
    assert report.names == ("a", "b")
    assert [layer.name for layer in report.layers] == (["embed"] if method == "lora" else []) + LAYERS
    for name, exact in expected.items():
        weight = model.get_submodule(name).base.weight
        assert weight.dtype == dtype
        assert not weight.requires_grad
        assert weight.is_contiguous()
        torch.testing.assert_close(weight, round_once(exact, dtype), rtol=0, atol=1e-15 if dtype.itemsize == 8 else 0)
    loose = {torch.bfloat16: 0.2, torch.float16: 0.03}.get(dtype, 1e-4)
    torch.testing.assert_close(model(IDS), out, rtol=loose, atol=loose * float(out.detach().abs().max()))
    unmerge(model)
    assert bits(model).keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in bits(model).items())
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == parameters
    assert torch.equal(model(IDS), out)


def test_rounding_once_is_to_the_nearest_with_ties_to_even() -> None:
    values = torch.randn(2000, dtype=torch.float64) * 10.0 ** torch.randint(-9, 5, (2000,))
    ties = [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 0.0]
    near = [tie + sign * 2.0**-40 for tie in ties for sign in (1, -1)]
    values = torch.cat([values, torch.tensor(ties + near + [-x for x in near], dtype=torch.float64)])
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        grid = every[every.isfinite()].double().unique()
        right = torch.searchsorted(grid, values).clamp(1, len(grid) - 1)
        low, high = grid[right - 1], grid[right]
        inside = (values >= low) & (values <= high)
        found = round_once(values, dtype).double()
        for value, a, b, got in zip(*(t[inside].tolist() for t in (values, low, high, found)), strict=True):
            below, above = Fraction(value) - Fraction(a), Fraction(b) - Fraction(value)
            if below != above:
                assert got == (a if below < above else b)
            else:
                even = torch.tensor(got, dtype=torch.float64).to(dtype).view(torch.int16).item() % 2 == 0
                assert even
    twice = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64)
    assert twice.to(torch.bfloat16) != round_once(twice, torch.bfloat16)  # when this fails, torch rounds once itself


def test_report_says_what_rounding_lost() -> None:
    model = inject(Model().bfloat16(), CONFIGS["loha"])
    set_scale(model, 1e-3)
    layer: Any = model.linear
    exact, before = exact_weight(layer), layer.base.weight.detach().double()
    report = merge(model)
    got = layer.base.weight.detach().double()
    entry = report.layers[1]
    assert entry.name == "linear"
    assert entry.dtype == torch.bfloat16
    assert entry.norm == pytest.approx(float((exact - before).norm()))
    assert entry.lost == pytest.approx(float((got - exact).norm() / (exact - before).norm()))
    assert entry.lost > 0.2
    total = sum(one.norm**2 for one in report.layers)
    assert report.lost == pytest.approx((sum((one.lost * one.norm) ** 2 for one in report.layers) / total) ** 0.5)
    text = str(report)
    assert f"linear: bfloat16, rounding lost {entry.lost:.2%} of the change" in text
    assert "lm_head: bfloat16, rounding lost" in text
    assert "no longer tied to embed" in text
    assert f"3 layers merged, rounding lost {report.lost:.2%} of the change" in text


def test_an_adapter_that_changes_nothing_loses_nothing() -> None:
    report = merge(inject(Model(), LoRA(target_modules=LAYERS)))
    assert report.lost == 0
    assert MergeReport((), ()).lost == 0


def test_a_tied_weight_is_untied_while_merged() -> None:
    model = inject(Model(), CONFIGS["loha"])
    embedding = model.embed.weight
    before = embedding.clone()
    merge(model)
    assert model.embed.weight is embedding
    assert torch.equal(embedding, before)
    assert model.lm_head.base.weight is not embedding
    unmerge(model)
    assert model.lm_head.base.weight is embedding


def test_some_adapters_merge_and_the_others_stay_beside() -> None:
    model = inject(inject(Model(), CONFIGS["loha"], "a"), CONFIGS["lokr"], "b")
    set_active(model, ["a", "b"])
    out = model(IDS)
    assert merge(model, "a").names == ("a",)
    assert model.linear.merged == ("a",)
    torch.testing.assert_close(model(IDS), out, rtol=1e-4, atol=1e-5)
    unmerge(model)
    set_active(model, "a")
    out = model(IDS)
    merge(model, ["b"])  # merged though not in use, as asked
    assert not torch.allclose(model(IDS), out)


def test_a_merged_model_moves_copies_and_pickles() -> None:
    model = inject(Model(), CONFIGS["lora"])
    before = model.linear.base.weight.detach().clone()
    merge(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(IDS), model(IDS))
        unmerge(other)
        assert torch.equal(other.linear.base.weight, before)
        assert other.lm_head.base.weight is other.embed.base.weight
    model.double()
    unmerge(model)
    assert model.linear.base.weight.dtype == torch.float64
    assert torch.equal(model.linear.base.weight, before.double())


def test_merged_weights_can_be_kept() -> None:
    model = inject(Model(), CONFIGS["loha"])
    out = model(IDS)
    merge(model)
    with pytest.raises(UsageError, match='"default" is merged into conv; unmerge the model first'):
        remove(model)
    remove(model, keep_merged=True)
    assert type(model.linear) is nn.Linear
    assert set(model.state_dict()) == set(Model().state_dict())
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(IDS), out, rtol=1e-4, atol=1e-5)


REFUSED: list[Any] = [
    merge,
    lambda m: inject(m, CONFIGS["lora"], "other"),
    lambda m: set_active(m, "default"),
    lambda m: set_scale(m, 2.0),
    lambda m: disable(m).__enter__(),
    lambda m: load_state_dict_into(m, state_dict_of(m)),
]


@pytest.mark.parametrize("act", REFUSED)
def test_a_merged_model_refuses_what_would_not_reach_its_weights(act: Any) -> None:
    model = inject(Model(), CONFIGS["loha"])
    merge(model)
    before = bits(model)
    with pytest.raises(UsageError, match='"default" is merged into conv; unmerge the model first'):
        act(model)
    assert all(torch.equal(value, before[key]) for key, value in bits(model).items())
    unmerge(model)


def test_there_must_be_something_to_unmerge_and_to_merge() -> None:
    model = inject(Model(), CONFIGS["loha"])
    with pytest.raises(UsageError, match="no adapter is merged into this model; call merge first"):
        unmerge(model)
    with pytest.raises(UsageError, match="no adapter is merged into this model; call merge first"):
        unmerge(Model())
    with pytest.raises(UsageError, match="the model has no adapter 'b', only \"default\"; name one of these"):
        merge(model, ["b"])
    set_active(model, [])
    with pytest.raises(UsageError, match="there is nothing to merge: no layer has an adapter in use; name"):
        merge(model)


def test_a_merge_that_fails_changes_nothing() -> None:
    model = inject(Model().half(), CONFIGS["loha"])
    with torch.no_grad():
        model.lm_head.adapter("default").hada_w1_a.fill_(1e6)
    before = bits(model)
    with pytest.raises(LowrankError, match='merging "default" into lm_head gives numbers that float16 cannot'):
        merge(model)
    assert all(torch.equal(value, before[key]) for key, value in bits(model).items())
    with pytest.raises(UsageError, match="no adapter is merged"):
        unmerge(model)


def test_weights_that_cannot_be_merged() -> None:
    limited = inject(nn.Sequential(nn.Embedding(4, 3, max_norm=1.0)), LoRA(target_modules=["0"]))
    with pytest.raises(UsageError, match=r"0 is an Embedding that rescales rows to max_norm 1\.0 when .* merge other"):
        merge(limited)
    computed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    inject(computed, LoRA(target_modules="0"))
    computed(torch.randn(1, 3))
    with pytest.raises(
        UsageError, match=r"0 computes its weight \(a parametrization, or a quantized layer\), so nothing can be merged"
    ):
        merge(computed)
    with torch.device("meta"):
        empty = inject(Model(), CONFIGS["lora"])
    with pytest.raises(UsageError, match="embed is on the meta device, which holds no numbers to merge; load its"):
        merge(empty)
