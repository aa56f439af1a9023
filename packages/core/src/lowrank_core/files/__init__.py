"""Adapters in files: PEFT folders, kohya / LyCORIS / ComfyUI files, diffusers' LoRA files, merged weights."""

from lowrank_core.files.as_lora import LoRAExport, as_lora
from lowrank_core.files.bundle import AdapterFile, Component, ModuleAdapter
from lowrank_core.files.combine import Combination, combine
from lowrank_core.files.convert import Conversion, convert
from lowrank_core.files.difference import NamedFolder, UnpackedModel
from lowrank_core.files.extract import Extraction, extract
from lowrank_core.files.factored import LayerFit
from lowrank_core.files.model import adapter_file_of, load, save, write
from lowrank_core.files.read import read

__all__ = [
    "AdapterFile",
    "Combination",
    "Component",
    "Conversion",
    "Extraction",
    "LayerFit",
    "LoRAExport",
    "ModuleAdapter",
    "NamedFolder",
    "UnpackedModel",
    "adapter_file_of",
    "as_lora",
    "combine",
    "convert",
    "extract",
    "load",
    "read",
    "save",
    "write",
]
