"""LoRA on grouped convolutions, which PEFT lays out otherwise than everybody else.

Here, in LyCORIS and in ComfyUI the weight `(out, in / G, *kernel)` is B · A with A `(r, in / G, *kernel)`. PEFT
convolves all inputs with A `(R, in, *kernel)`, and each group of outputs takes R / G of the results. With R = G·r and
zeros for the inputs of other groups it computes the same; an A of PEFT's that is filled otherwise has no equal here.
"""

from dataclasses import replace

import torch
from torch import Tensor

from lowrank_core.adapters.config import LoRA
from lowrank_core.errors import LowrankError
from lowrank_core.files.bundle import AdapterFile, Layers, ModuleAdapter, with_patterns


def to_peft(file: AdapterFile, layers: Layers | None) -> AdapterFile:
    """The file with its LoRAs on grouped convolutions in PEFT's layout; only the layers say which ones are grouped."""
    downs: dict[str, Tensor] = {}
    for name, module in file.modules.items():
        groups = layers[name].groups if layers is not None and name in layers else 1
        if groups > 1 and isinstance(file.config, LoRA) and _groups(module) == 1:
            downs[name] = _widened(module.factors["lora_A"], groups)
    return _with_downs(file, downs)


def from_peft(file: AdapterFile) -> AdapterFile:
    """The file with such LoRAs in our layout; B's second dimension, r instead of R, tells them.

    Raises:
        LowrankError: an A that mixes the groups' inputs.
    """
    downs: dict[str, Tensor] = {}
    for name, module in file.modules.items():
        groups = _groups(module)
        if groups > 1:
            down = module.factors["lora_A"]
            narrow = down[: down.shape[0] // groups, : down.shape[1] // groups]
            if not torch.equal(_widened(narrow, groups), down):
                raise LowrankError(
                    f"{name} is a grouped convolution, and its lora_A mixes the inputs of the groups as only PEFT "
                    "does; merge the adapter with PEFT"
                )
            downs[name] = narrow
    return _with_downs(file, downs)


def _groups(module: ModuleAdapter) -> int:
    """How many groups a LoRA in PEFT's layout has; 1 in ours."""
    factors = module.factors
    if "lora_A" not in factors or factors["lora_A"].dim() < 3:
        return 1
    return factors["lora_A"].shape[0] // factors["lora_B"].shape[1]


def _widened(down: Tensor, groups: int) -> Tensor:
    rank, inputs = down.shape[:2]
    wide = down.new_zeros(groups, rank, groups * inputs, *down.shape[2:])
    for group in range(groups):
        wide[group, :, group * inputs : (group + 1) * inputs] = down
    return wide.flatten(0, 1)


def _with_downs(file: AdapterFile, downs: dict[str, Tensor]) -> AdapterFile:
    if not downs:
        return file
    modules = dict(file.modules)
    for name, down in downs.items():
        module, rank, scaling = modules[name], down.shape[0], file.scaling(name)
        alpha = scaling * (rank**0.5 if file.config.rank_stabilized else rank)
        modules[name] = ModuleAdapter({**module.factors, "lora_A": down}, rank, alpha, module.magnitude, module.axis)
    return replace(file, modules=modules, config=with_patterns(file.config, modules))
