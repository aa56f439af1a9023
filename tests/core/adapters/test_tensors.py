"""An adapter's tensors, out of a model and into it."""

import pytest
import torch
from adapter_models import CONFIGS, IDS, Model

from lowrank_core import LowrankError, UsageError, adapters_of, inject, load_state_dict_into, state_dict_of


@pytest.mark.parametrize("method", CONFIGS)
def test_tensors_go_out_and_in(method: str) -> None:
    model = inject(Model(), CONFIGS[method])
    torch.manual_seed(1)
    other = Model()
    other.load_state_dict({k.replace(".base.", "."): v for k, v in model.state_dict().items() if ".base." in k}, False)
    other.embed.weight.data.copy_(model.embed.weight)
    inject(other, CONFIGS[method], "else")
    tensors = {key: value.clone() for key, value in state_dict_of(model).items()}
    load_state_dict_into(other, tensors, "else")
    for key, value in state_dict_of(other, "else").items():
        assert torch.equal(value, tensors[key])
    assert all("adapters" not in key and "base" not in key for key in tensors)
    if method == "lora":
        assert list(tensors)[:3] == ["embed.lora_embedding_A", "embed.lora_embedding_B", "conv.lora_A"]


def test_adaloras_fewer_directions_load() -> None:
    model = inject(Model(), CONFIGS["adalora"])
    tensors = {key: value.clone() for key, value in state_dict_of(model).items()}
    for name, dim in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
        tensors[f"conv.{name}"] = tensors[f"conv.{name}"].narrow(dim, 0, 1)
    load_state_dict_into(model, tensors)
    adapter = adapters_of(model)["conv"]
    assert adapter.lora_A.shape == (1, 12)
    assert adapter.lora_B.requires_grad
    assert adapter.scaling == pytest.approx(8 / 3, rel=1e-4)
    model(IDS)


def test_loading_refuses_what_does_not_fit_and_loads_nothing() -> None:
    model = inject(Model(), CONFIGS["loha"])
    good = {key: torch.ones_like(value) for key, value in state_dict_of(model).items()}
    before = {key: value.clone() for key, value in state_dict_of(model).items()}
    key = "conv.hada_w1_a"
    for tensors, message in (
        ({k: v for k, v in good.items() if k != key}, f"lacks {key}; load what was saved from the same model"),
        ({k: v for k, v in good.items() if k.startswith("conv")}, "lacks block.0.hada_w1_a.* and 7 more; load"),
        ({**good, "lm_head.x": torch.ones(1)}, "adapter 'default' has no place for lm_head.x; load what was saved"),
        ({**good, key: torch.ones(3, 2)}, rf"{key} has shape \[3, 2\] where adapter 'default' has \[8, 8\]; inject it"),
        (
            {**good, key: good[key].long()},
            f"{key} holds torch.int64 where adapter 'default' has torch.float32",
        ),
    ):
        with pytest.raises(LowrankError, match=message):
            load_state_dict_into(model, tensors)
        assert all(torch.equal(value, before[k]) for k, value in state_dict_of(model).items())
    with pytest.raises(UsageError, match="the model has no adapter 'other', only \"default\"; name one of these"):
        load_state_dict_into(model, good, "other")
    with torch.device("meta"):
        empty = inject(Model(), CONFIGS["loha"])
    with pytest.raises(LowrankError, match="adapter 'default' is on the meta device, which holds no numbers; call"):
        load_state_dict_into(empty, good)
