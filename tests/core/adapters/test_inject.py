"""Injection: in place, undone to the object, several adapters at once, and every refusal."""

import copy
import pickle
from typing import Any

import pytest
import torch
from adapter_models import CONFIGS, IDS, Model, random_lora, snapshot
from torch import nn

from lowrank_core import (
    AdaptedLayer,
    LoRA,
    UsageError,
    adapters_of,
    configs_of,
    disable,
    inject,
    merge,
    remove,
    set_active,
    set_scale,
    state_dict_of,
    trainable_parameters,
)


@pytest.mark.parametrize("method", CONFIGS)
def test_what_is_injected_trains_alone_and_remove_undoes_it(method: str) -> None:
    model = Model()
    model.conv.bias.requires_grad_(False)
    before, out = snapshot(model), model(IDS)
    assert inject(model, CONFIGS[method]) is model
    assert model.again is model.block[0]
    assert isinstance(model.again, AdaptedLayer)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names
    assert all(".adapters." in name or ".copies." in name for name in names)
    assert {id(p) for p in trainable_parameters(model)} == {id(p) for p in model.parameters() if p.requires_grad}
    model(IDS).sum().backward()
    assert all(p.grad is None for n, p in model.named_parameters() if n not in names)
    assert all(p.grad is not None for p in trainable_parameters(model))
    assert list(configs_of(model)) == ["default"]
    remove(model)
    assert snapshot(model) == before
    assert torch.equal(model(IDS), out)
    assert configs_of(model) == {}


def test_disable_gives_the_base_and_restores_after_an_error() -> None:
    model = Model()
    out = model(IDS)
    inject(model, CONFIGS["loha"])
    with torch.no_grad():
        model.head.weight.add_(1)  # the trained copy
    adapted = model(IDS)
    with disable(model):
        torch.testing.assert_close(model(IDS), out)
        with disable(model):
            pass
        torch.testing.assert_close(model(IDS), out)
    with pytest.raises(ZeroDivisionError), disable(model):
        _ = 1 // 0
    assert torch.equal(model(IDS), adapted)


def test_adapters_add_up_with_their_weights() -> None:
    model = Model()
    base = model.block[2].weight.detach()
    inject(model, random_lora("block.2", alpha=3), "a")
    inject(model, random_lora("block.2", "conv", rank=2), "b")
    assert model.block[2].active == ["b"]  # the new one, alone
    assert model.conv.active == ["b"]
    set_active(model, ["a", "b"], [0.5, 2.0])
    a, b = (model.block[2].adapter(name) for name in "ab")
    assert a.weight == 0.5
    x = torch.randn(3, 8)
    weight = base + 0.5 * a.scaling * a.form.compose(a.factors, a.geometry)
    weight = weight + 2 * b.scaling * b.form.compose(b.factors, b.geometry)
    torch.testing.assert_close(model.block[2](x), nn.functional.linear(x, weight, model.block[2].bias))
    torch.testing.assert_close(a.compose() + b.compose(), weight - base)
    set_scale(model, 0.0)
    torch.testing.assert_close(model.block[2](x), model.block[2].base(x))
    set_scale(model, 1.0, "a")
    set_active(model, "a")
    assert not any(p.requires_grad for p in b.parameters())
    assert all(p.requires_grad for p in a.parameters())
    assert model.conv.active == []
    torch.testing.assert_close(model.block[2](x) - model.block[2].base(x), x @ a.compose().T)
    assert set(adapters_of(model, "b")) == {"conv", "block.2"}
    remove(model, "a")
    assert list(configs_of(model)) == ["b"]
    assert list(model.block[2].adapters) == ["b"]
    remove(model, "b")
    assert type(model.block[2]) is nn.Linear


def test_names_are_those_of_the_model_without_adapters() -> None:
    model = inject(Model(), CONFIGS["loha"], "first")
    config = LoRA(target_modules=r"block\.0|conv", modules_to_save=["head"])
    inject(model, config, "second")
    assert list(adapters_of(model, "second")) == ["conv", "block.0"]
    assert {key.rpartition(".")[0] for key in state_dict_of(model, "second")} == {"conv", "block.0", "head"}


def test_tied_weights_stay_tied_and_an_adapter_changes_one_side() -> None:
    model = Model()
    inject(model, random_lora("embed"))
    assert model.lm_head.weight is model.embed.weight
    x = torch.randn(2, 8)
    torch.testing.assert_close(model.lm_head(x), x @ model.embed.base.weight.T)
    assert not torch.allclose(model.embed(IDS), model.embed.base(IDS))


def test_saved_modules_are_trained_copies() -> None:
    model = Model()
    head, out = model.head, model(IDS)
    inject(model, CONFIGS["loha"], "a")
    inject(model, LoRA(target_modules=["conv"], modules_to_save=["head"]), "b")
    copied = model.head.copies["b"]
    assert model.head.base is head
    assert model.head.weight is copied.weight  # attributes are those of the copy in use
    assert copied.weight.requires_grad
    assert not head.weight.requires_grad
    assert not model.head.copies["a"].weight.requires_grad
    torch.testing.assert_close(model(IDS), out)
    with torch.no_grad():
        copied.bias.add_(1)
    assert not torch.allclose(model(IDS), out)
    with pytest.raises(UsageError, match='"a", "b" each train a copy of head, and it can be only one; activate one of'):
        set_active(model, ["a", "b"])
    assert model.conv.active == ["b"]
    remove(model, "b")
    torch.testing.assert_close(model.head(torch.ones(8)), head(torch.ones(8)))
    remove(model)
    assert model.head is head


@pytest.mark.parametrize("method", CONFIGS)
def test_copies_and_pickles(method: str) -> None:
    model = inject(Model(), CONFIGS[method])
    out = model(IDS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS), out)
        assert configs_of(other) == configs_of(model)
        assert other.again is other.block[0]
        remove(other)
        assert not any(isinstance(module, AdaptedLayer) for module in other.modules())
    assert torch.equal(model(IDS), out)


@pytest.mark.parametrize("method", CONFIGS)
def test_meta_weights_get_meta_factors(method: str) -> None:
    with torch.device("meta"):
        model = Model()
    inject(model, CONFIGS[method])
    assert all(p.is_meta for p in model.parameters())


def test_factors_have_the_dtype_asked_for() -> None:
    for base, asked, found in (
        (torch.bfloat16, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ):
        model = inject(Model().to(base), CONFIGS["lokr"], dtype=asked)
        assert {p.dtype for a in adapters_of(model).values() for p in a.parameters()} == {found}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_torchs_transformer_does_not_pass_the_adapters_by(mode: str) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)
    x = torch.randn(2, 3, 8)
    mask = torch.tensor([[False, False, True], [False, False, False]])
    before = snapshot(encoder), dict(encoder.layers[0].__dict__)
    inject(encoder, random_lora("linear1", "linear2"), "a")
    inject(encoder, random_lora("linear1"), "b")
    set_active(encoder, ["a", "b"])
    encoder.train(mode == "train")
    expected = copy.deepcopy(encoder)
    for layer in expected.layers:
        for linear in (layer.linear1, layer.linear2):
            change = sum(linear.adapter(name).compose() for name in linear.active)
            linear.base.weight.data += change
    remove(expected)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), expected(x), rtol=1e-4, atol=1e-5)
        padded = encoder(x, src_key_padding_mask=mask)
        torch.testing.assert_close(padded[~mask], expected(x, src_key_padding_mask=mask)[~mask], rtol=1e-4, atol=1e-5)
    remove(encoder.train())
    assert (snapshot(encoder), dict(encoder.layers[0].__dict__)) == before


def test_training_mode_is_the_layers() -> None:
    model = inject(Model().eval(), CONFIGS["lora"])
    assert not any(module.training for module in model.modules())


REFUSED: list[tuple[Any, str]] = [
    (lambda m: inject(m, random_lora("conv"), "a"), "the model has an adapter 'a' already; choose another name, or"),
    (lambda m: inject(m, random_lora("conv"), "b.c"), "an adapter's name is a word without dots .* got 'b.c'"),
    (lambda m: inject(m, random_lora("conv"), "keys"), "that nn.ModuleDict has no use for, got 'keys'"),
    (lambda m: inject(m, random_lora("conv"), ""), "an adapter's name is a word without dots .* got ''"),
    (lambda m: inject(m, random_lora("conv"), "b", dtype=torch.int8), "factors' dtype must be .* got torch.int8"),
    (lambda m: inject(m, object(), "b"), "config must be a LoRA, LoHa, LoKr or AdaLoRA of lowrank_core, got object"),
    (lambda m: inject(m, random_lora("conv"), "b").nothing, "nothing"),
    (lambda m: inject(m, random_lora("cnov"), "b"), "target_modules 'cnov' matches no module; the nearest"),
    (lambda m: inject(m, random_lora("conv", modules_to_save=["block"]), "b"), "would train block whole .* block.0 in"),
    (
        lambda m: inject(m, random_lora("head"), "b"),
        "would train head whole and another adapts head in it;",
    ),
    (lambda m: set_active(m, ["a", "c"]), "the model has no adapter 'c', only \"a\"; name one of these"),
    (lambda m: set_active(m, ["a"], [1.0, 2.0]), 'weights must have one number for each adapter, got 2 for "a"'),
    (lambda m: set_scale(m, 2.0, "c"), "the model has no adapter 'c'"),
    (lambda m: remove(m, "c"), "the model has no adapter 'c'"),
    (lambda m: remove(m, "a", keep_merged=True), "keep_merged removes all adapters at once, got the name 'a'; leave"),
    (lambda m: state_dict_of(m, "c"), "the model has no adapter 'c'"),
    (lambda m: adapters_of(m, "c"), "the model has no adapter 'c'"),
]


@pytest.mark.parametrize(("act", "message"), REFUSED, ids=lambda v: v[:40] if isinstance(v, str) else "")
def test_refusals_leave_the_model_as_it_was(act: Any, message: str) -> None:
    model = inject(Model(), CONFIGS["loha"], "a")
    before = snapshot(model)
    kind = AttributeError if message == "nothing" else UsageError
    with pytest.raises(kind, match=message):
        act(model)
    if kind is UsageError:
        assert snapshot(model) == before


def test_a_failure_in_the_middle_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

        def __setattr__(self, name: str, value: Any) -> None:
            if isinstance(value, AdaptedLayer) and name == "second":
                raise RuntimeError("no")
            super().__setattr__(name, value)

    model = Stubborn()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="no"):
        inject(model, random_lora("first", "second"))
    assert snapshot(model) == before


def test_what_has_no_adapters_says_so() -> None:
    for act in (remove, merge, adapters_of, state_dict_of, lambda m: set_active(m, []), lambda m: set_scale(m, 1)):
        with pytest.raises(UsageError, match="the model has no adapters; inject one first"):
            act(Model())
    with pytest.raises(UsageError, match="the model has no adapters; inject one first"), disable(Model()):
        pass


def test_several_adapters_must_be_named() -> None:
    model = inject(inject(Model(), CONFIGS["lora"], "a"), CONFIGS["lokr"], "b")
    with pytest.raises(UsageError, match='the model has 2 adapters, "a", "b"; say which one is meant'):
        adapters_of(model)


def test_modules_to_save_must_be_callable_and_unquantized() -> None:
    model = nn.ModuleDict({"list": nn.ModuleList([nn.Linear(2, 2)]), "layer": nn.Linear(2, 2), "packed": nn.Module()})
    model["packed"].weight = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    before = snapshot(model)
    with pytest.raises(UsageError, match="modules_to_save names list, a ModuleList that is never called; name what it"):
        inject(model, LoRA(target_modules=["layer"], modules_to_save=["list"]))
    with pytest.raises(UsageError, match="modules_to_save names packed, which holds quantized weights; load the model"):
        inject(model, LoRA(target_modules=["layer"], modules_to_save=["packed"]))
    assert snapshot(model) == before
