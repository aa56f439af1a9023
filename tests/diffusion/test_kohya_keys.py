"""The kohya file for the real SDXL: every key names the layer it was made for, as ComfyUI and sd-scripts find it."""

import math
from dataclasses import replace

import pytest
import torch
from ldm_layout import flat, text_layers, unet_layers
from safetensors.torch import load_file
from torch import nn

from lowrank_core import AdaLoRA, LoHa, LoKr, LoRA, inject
from lowrank_core.files import adapter_file_of, write
from lowrank_core.files.model import layers_of_model
from lowrank_diffusion.outline import outlined

CONFIGS = {
    "lora": (LoRA(rank=1, target_modules=[]), "lora_down.weight"),
    "loha": (LoHa(rank=1, target_modules=[]), "hada_w2_b"),
    "lokr": (LoKr(rank=1, target_modules=[]), "lokr_w2_b"),
    # Written as the LoRA that it is.
    "adalora": (AdaLoRA(rank=1, target_rank=1, target_modules=[]), "lora_down.weight"),
}
"""With the tensor that comes into the file as it is."""
TEXT = {"te1": ("text_encoder", 768, 12), "te2": ("text_encoder_2", 1280, 32)}


def marked(model: nn.Module, config, component, numbers):
    """An adapter on every layer in `numbers`, all factors of each filled with its number."""
    inject(model, replace(config, target_modules=list(numbers)))
    file = adapter_file_of(model)
    modules = {}
    for name, module in file.modules.items():
        factors = {key: torch.full(t.shape, float(numbers[name])) for key, t in module.factors.items()}
        if "lora_E" in factors:
            factors["lora_E"].fill_(1)
        modules[name] = replace(module, factors=factors)
    return replace(file, component=component, modules=modules)


def composed(leaves) -> tuple[int, int]:
    """The shape of ΔW as a matrix, from a module's tensors in the file."""
    if "lora_up.weight" in leaves:
        return len(leaves["lora_up.weight"]), leaves["lora_down.weight"][0].numel()
    if "hada_w1_a" in leaves:
        return len(leaves["hada_w1_a"]), leaves["hada_w1_b"][0].numel()
    outer, inner = leaves["lokr_w1"], [leaves["lokr_w2_a"], leaves["lokr_w2_b"]]
    return len(outer) * len(inner[0]), outer[0].numel() * inner[1][0].numel()


def modules_in(path):
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(path).items():
        module, _, leaf = key.partition(".")
        found.setdefault(module, {})[leaf] = tensor
    return found


def assert_found(found, expected, leaf):
    """expected: by a module's name in the file, the layer's number and the shape of its weight."""
    assert found.keys() == expected.keys()
    for name, (number, shape) in expected.items():
        assert composed(found[name]) == (shape[0], math.prod(shape[1:])), name
        assert set(found[name][leaf].flatten().tolist()) == {float(number)}, name


@pytest.mark.slow
@pytest.mark.parametrize("method", [m if m != "adalora" else pytest.param(m, marks=pytest.mark.slow) for m in CONFIGS])
def test_every_key_is_the_layer_of_the_unet_that_comfyui_and_kohya_look_up(method, tmp_path):
    config, leaf = CONFIGS[method]
    unet = outlined("unet")[0]
    layers = list(unet_layers())
    file = marked(unet, config, "unet", {layer.diffusers: number for number, layer in enumerate(layers, 1)})
    path = write([file], tmp_path / "a.safetensors", "kohya", {"unet": layers_of_model(unet)})
    expected = {flat("lora_unet", layer.ldm): (number, layer.shape) for number, layer in enumerate(layers, 1)}
    # 70 blocks of 10 layers, 11 transformers with 2 more, 17 residual blocks with 11 shortcuts, 4 resamplings, 6 ends.
    assert len(expected) == 700 + 22 + 3 * 17 + 11 + 4 + 6
    assert_found(modules_in(path), expected, leaf)


@pytest.mark.slow
@pytest.mark.parametrize("method", CONFIGS)
def test_every_key_is_the_layer_of_the_text_encoder_that_they_look_up(method, tmp_path):
    config, leaf = CONFIGS[method]
    files, layers, expected = [], {}, {}
    for component, (name, width, count) in TEXT.items():
        model = outlined(name)[0]
        # Some versions of transformers have no level text_model.
        missing = "" if hasattr(model, "text_model") else "text_model."
        numbers = {}
        for number, (layer, shape) in enumerate(text_layers(width, count, projected=width == 1280), 1):
            numbers[layer.removeprefix(missing)] = number
            expected[flat(f"lora_{component}", layer)] = (number, shape)
        files.append(marked(model, config, component, numbers))
        layers[component] = layers_of_model(model)
    assert len(expected) == 6 * (12 + 32) + 1
    assert_found(modules_in(write(files, tmp_path / "a.safetensors", "kohya", layers)), expected, leaf)


@pytest.mark.slow
def test_diffusers_computes_the_same_layers_in_the_same_order():
    """What pairs the two libraries' names in `ldm_layout`: both networks are one, so the nth layer is the nth layer."""
    from lowrank_diffusion.blank import blank_sdxl

    network = blank_sdxl("unet")
    computed = []
    for name, module in network.model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: computed.append((name, tuple(module.weight.shape)))
            )
    network.model(*network.arguments, **network.named)
    assert computed == [(layer.diffusers, layer.shape) for layer in unet_layers()]
