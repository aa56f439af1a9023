"""Targets: PEFT's meaning, by comparison with PEFT, and its silences as errors."""

import importlib.util
from typing import Any

import pytest
from torch import nn

from lowrank_core.adapters.config import LoRA
from lowrank_core.adapters.targets import find_targets


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.v_proj = nn.Linear(8, 4)
        self.o_proj = nn.Linear(8, 8)


class Block(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.attn = Attention()
        self.cross_attn = Attention()
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)})
        self.experts = nn.ModuleList(nn.ModuleDict({"fc1": nn.Linear(8, 8)}) for _ in range(experts))
        self.norm = nn.LayerNorm(8)


class Transformer(nn.Module):
    """A transformer's names: numbered layers with numbered experts, an embedding, convolutions, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv_in = nn.Conv2d(3, 8, 3)
        self.patch = nn.Conv1d(4, 8, 2, padding_mode="circular")
        self.layers = nn.ModuleList(Block(experts=2) for _ in range(3))
        self.decoder = nn.Module()
        self.decoder.h = nn.ModuleList(Block(experts=0) for _ in range(2))
        self.classifier = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
        self.lm_head = nn.Linear(8, 11)


MEANINGS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["attn.q_proj"]},
    {"target_modules": ["layers.0.attn.q_proj", "fc1"]},
    {"target_modules": ["0"], "exclude_modules": r"(layers|decoder)\..*"},
    {"target_modules": ["fc1", "conv_in", "embed"]},
    {"target_modules": r".*attn\.(q|v)_proj"},
    {"target_modules": r"layers\.[12]\.mlp\.fc\d"},
    {"target_modules": "lm_head|classifier\\.1"},
    {"target_modules": "all-linear"},
    {"target_modules": "ALL-LINEAR", "exclude_modules": ["lm_head", "cross_attn.q_proj"]},
    {"target_modules": "all-linear", "modules_to_save": ["classifier"]},
    {"target_modules": "all-linear", "modules_to_save": ["layers.1", "lm_head"]},
    {"target_modules": ["q_proj", "fc1"], "exclude_modules": ["layers.0.attn.q_proj", "mlp.fc1"]},
    {"target_modules": ["q_proj", "fc1"], "exclude_modules": r".*experts.*"},
    {"target_modules": ["q_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "fc1"], "layers_to_transform": [0, 2]},
    {"target_modules": ["fc1", "lm_head"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj", "fc1"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "fc1"], "layers_to_transform": [0, 1], "layers_pattern": ["h", "experts"]},
    {"target_modules": ["fc1"], "layers_to_transform": [0], "layers_pattern": "experts"},
    {
        "target_modules": ["q_proj", "v_proj", "fc1"],
        "rank_pattern": {"attn.q_proj": 2, "q_proj": 3, r"layers\.0\..*": 5},
        "alpha_pattern": {r"layers\.\d\.attn\.v_proj": 3, "fc1": 5},
    },
    {"target_modules": "all-linear", "rank_pattern": {"lm_head": 16, "1": 4, "0|fc2": 6, r"^layers\.2.*": 1}},
]


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fields", MEANINGS, ids=lambda f: ",".join(map(str, f.values()))[:60])
def test_targets_ranks_and_alphas_are_those_of_peft(fields: dict[str, Any]) -> None:
    import peft

    ours = find_targets(Transformer(), LoRA(**fields))
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=8, lora_alpha=8, **fields), Transformer())
    theirs = {
        name: (module.r["default"], module.lora_alpha["default"])
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert {t.name: (t.rank, t.alpha) for t in ours} == theirs
    assert [t.name for t in ours] == list(theirs)
