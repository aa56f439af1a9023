"""SDXL's networks as lists of their layers, so that counting them waits for neither diffusers nor transformers.

`python -m lowrank_diffusion.outline` writes the lists from the networks that diffusers and transformers build; a test
holds them against each other.
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank_core.costs.trace import CountFlops, ForwardCost, LayerCall, trace
from lowrank_diffusion.sdxl import COMPONENTS


def outlined(component: str) -> tuple[nn.Module, ForwardCost]:
    """`unet`, `text_encoder` or `text_encoder_2` of SDXL: its layers under their names on the meta device, in modules
    that do nothing, and what one forward costs.
    """
    outline = json.loads((files("lowrank_diffusion") / "outlines" / f"{component}.json").read_text(encoding="utf-8"))
    root, calls = nn.Module(), dict[str, LayerCall]()
    numbered = sorted((number, name, kind) for kind in outline["kinds"] for number, name in kind["layers"])
    with torch.device("meta"), CountFlops():
        for _, name, kind in numbered:
            parent = root
            *path, last = name.split(".")
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, getattr(nn, kind["type"])(**kind["options"]))
            if kind["inputs"]:
                calls[name] = LayerCall(tuple(map(tuple, kind["inputs"])), kind["flops"])
    return root, ForwardCost(outline["flops"], calls)


def outline_of(model: nn.Module, cost: ForwardCost) -> dict[str, Any]:
    """The layers of a model that have weights, those alike together, as JSON."""
    kinds: dict[str, dict[str, Any]] = {}
    layers = [(name, module) for name, module in model.named_modules() if list(module.parameters(recurse=False))]
    for number, (name, module) in enumerate(layers):
        call = cost.layers.get(name, LayerCall((), 0))
        kind = {"type": _type(module), "options": _options(module), "inputs": call.inputs, "flops": call.flops}
        kinds.setdefault(json.dumps(kind), {**kind, "layers": []})["layers"].append((number, name))
    return {"flops": cost.flops, "kinds": list(kinds.values())}


def _type(module: nn.Module) -> str:
    kinds = (nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.GroupNorm)
    return next(kind.__name__ for kind in kinds if isinstance(module, kind))


def _options(module: nn.Module) -> dict[str, Any]:
    """What torch's constructor takes; biases and affine weights are the defaults unless said."""
    if isinstance(module, nn.Linear):
        options = {"in_features": module.in_features, "out_features": module.out_features}
        return options if module.bias is not None else options | {"bias": False}
    if isinstance(module, nn.Conv2d):
        options = {"in_channels": module.in_channels, "out_channels": module.out_channels}
        return options | {"kernel_size": module.kernel_size, "stride": module.stride, "padding": module.padding}
    if isinstance(module, nn.Embedding):
        return {"num_embeddings": module.num_embeddings, "embedding_dim": module.embedding_dim}
    if isinstance(module, nn.LayerNorm):
        return {"normalized_shape": module.normalized_shape}
    assert isinstance(module, nn.GroupNorm)
    return {"num_groups": module.num_groups, "num_channels": module.num_channels}


def write_outlines(folder: Path) -> None:
    """Write `COMPONENT.json` for each of SDXL's networks."""
    from lowrank_diffusion.blank import blank_sdxl

    for component in COMPONENTS:
        network = blank_sdxl(component)
        outline = outline_of(network.model, trace(network.model, *network.arguments, **network.named))
        lines = ",\n".join(json.dumps(kind, separators=(",", ":")) for kind in outline["kinds"])
        text = f'{{"flops":{outline["flops"]},"kinds":[\n{lines}\n]}}\n'
        (folder / f"{component}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_outlines(Path(__file__).parent / "outlines")
