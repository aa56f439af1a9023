"""Targets: PEFT's meaning, by comparison with PEFT, and its silences as errors."""

from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from lowrank_core import AdaLoRA, LoHa, LoKr, LoRA, UsageError, find_targets, inject


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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fields", MEANINGS, ids=lambda f: ",".join(map(str, f.values()))[:60])
def test_targets_ranks_and_alphas_are_those_of_peft(fields: dict[str, Any]) -> None:
    assert_those_of_peft(Transformer(), fields)


def assert_those_of_peft(model: nn.Module, fields: dict[str, Any]) -> None:
    ours = find_targets(model, LoRA(**fields))
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=8, lora_alpha=8, **fields), model)
    theirs = {
        name: (module.r["default"], module.lora_alpha["default"])
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert {t.name: (t.rank, t.alpha) for t in ours} == theirs
    assert [t.name for t in ours] == list(theirs)


NAMES = [name for name, module in Transformer().named_modules() if isinstance(module, nn.Linear)]
ENDINGS = sorted({".".join(name.split(".")[-n:]) for name in NAMES for n in (1, 2, 3) if not name[-1].isdigit()})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=25, deadline=None)
@given(
    targets=st.lists(st.sampled_from(ENDINGS), min_size=1, max_size=4, unique=True),
    excluded=st.lists(st.sampled_from(ENDINGS), max_size=2),
    saved=st.lists(st.sampled_from(["lm_head", "classifier", "layers.1", "decoder"]), max_size=1),
    layers=st.none() | st.integers(0, 3) | st.lists(st.integers(0, 3), max_size=2),
    ranks=st.dictionaries(st.sampled_from(ENDINGS), st.integers(1, 9), max_size=3),
)
def test_random_targets_are_those_of_peft(
    targets: list[str], excluded: list[str], saved: list[str], layers: Any, ranks: dict[str, int]
) -> None:
    with torch.device("meta"):
        model = Transformer()
    fields = {
        "target_modules": targets,
        "exclude_modules": excluded,
        "modules_to_save": saved,
        "layers_to_transform": layers,
        "rank_pattern": ranks,
    }
    try:
        ours = find_targets(model, LoRA(**{**fields, "rank_pattern": {}}))
    except UsageError:
        with pytest.raises(UsageError, match="no layer is left to adapt"):
            find_targets(model, LoRA(**{**fields, "rank_pattern": {}}))
        with pytest.raises(ValueError, match=r"All modules were excluded|No modules were targeted|not found"):
            peft.inject_adapter_in_model(peft.LoraConfig(**fields), model)
        return
    used = {key: rank for key, rank in ranks.items() if any(f".{t.name}".endswith(f".{key}") for t in ours)}
    assert_those_of_peft(model, {**fields, "rank_pattern": used})


@pytest.mark.filterwarnings("ignore")
def test_all_linear_leaves_out_the_heads_of_transformers_models() -> None:
    with torch.device("meta"):
        causal = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16))
        classifier = BertForSequenceClassification(
            BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=16)
        )
    targets = find_targets(causal, LoRA(target_modules="all-linear"))
    assert {t.geometry.transposed for t in targets} == {True}
    assert "lm_head" not in [t.name for t in targets]
    assert [t.name for t in find_targets(classifier, LoRA(target_modules="all-linear"))][-1] == "classifier"
    config = LoRA(target_modules="all-linear", other_fields={"task_type": "SEQ_CLS"})
    assert [t.name for t in find_targets(classifier, config)][-1] == "bert.pooler.dense"
    assert_those_of_peft(causal, {"target_modules": "all-linear"})
    assert_those_of_peft(classifier, {"target_modules": "all-linear"})


def test_targets_of_an_injected_model_are_those_of_the_model_without_adapters() -> None:
    model = Transformer()
    config = LoRA(target_modules="all-linear", modules_to_save=["classifier"])
    before = find_targets(model, config)
    assert find_targets(inject(model, config), config) == before


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qweight = torch.zeros(2, dtype=torch.int32)


def _quantized() -> nn.Linear:
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    return layer


def _in(name: str, layer: nn.Module) -> nn.Module:
    return nn.ModuleDict({name: layer, "linear": nn.Linear(2, 2)})


REFUSED: list[tuple[Any, Any, str]] = [
    (
        {"target_modules": ["q_porj"]},
        None,
        "target_modules 'q_porj' matches no module; the nearest names are",
    ),
    ({"target_modules": ["q_proj", "atn.v_proj"]}, None, """'atn.v_proj' matches no module; .* "attn.v_proj", """),
    ({"target_modules": ["proj"]}, None, """target_modules 'proj' matches no module; the nearest names are .*_proj"""),
    (
        {"target_modules": r"layers\.\d\.atn\.q_proj"},
        None,
        """matches no module; the nearest .* "layers.0.attn.q_proj""",
    ),
    ({"target_modules": ["!"]}, None, """'!' matches no module; the model has, for instance, "embed", "conv_in","""),
    (
        {"target_modules": []},
        None,
        'target_modules names no module; list some, such as "embed", .* "all-linear"',
    ),
    ({"target_modules": ""}, None, "target_modules names no module; list some"),
    ({"target_modules": "*proj"}, None, r"'\*proj' is not a regular expression: nothing to repeat .*; mend it"),
    ({"exclude_modules": ["nonsense"]}, None, "exclude_modules 'nonsense' matches no module; "),
    ({"exclude_modules": ".*nonsense"}, None, "exclude_modules '.*nonsense' matches no module; "),
    ({"modules_to_save": ["hed"]}, None, "modules_to_save 'hed' matches no module; the nearest names are "),
    (
        {"rank_pattern": {"k_proj": 2}},
        None,
        """rank_pattern 'k_proj' matches no adapted layer; the nearest .* "q_proj""",
    ),
    ({"alpha_pattern": {"(": 2}}, None, "alpha_pattern '.*' is not a regular expression"),
    (
        {"exclude_modules": ["q_proj"]},
        None,
        "no layer is left to adapt: exclude_modules or modules_to_save names",
    ),
    ({"layers_to_transform": 7}, None, "no layer is left to adapt: layers_to_transform leaves out everything"),
    (
        {"target_modules": ["norm"]},
        None,
        "layers.0.norm is of type LayerNorm, and adapters go to Linear, .*; leave it",
    ),
    ({"target_modules": ["attn"]}, None, "layers.0.attn is of type Attention, and adapters go to"),
    (
        {"target_modules": ["patch"]},
        None,
        "patch pads by 'circular', and adapters cover zero padding alone; leave",
    ),
    ({"target_modules": ["0"]}, nn.Linear(2, 2), "the model is itself a Linear, which .* put it in an nn.Sequential"),
    ({"target_modules": "all-linear"}, nn.Sequential(nn.ReLU()), 'target_modules "all-linear" matches no module'),
    (
        {"target_modules": ["x"]},
        _in("x", Packed()),
        "x is a quantized layer \\(Packed\\), .* load the model",
    ),
    (
        {"target_modules": ["x"]},
        _in("x", _quantized()),
        "x is a quantized layer \\(Linear\\), which is not supported",
    ),
    ({"target_modules": ["x"]}, _in("x", nn.LazyLinear(2)), "x has no weight yet \\(LazyLinear\\); run the model once"),
    (
        {"target_modules": ["out_proj"]},
        _in("x", nn.MultiheadAttention(4, 2)),
        "x.out_proj is read by nn.MultiheadAttention without being called, so no adapter acts; leave it out with",
    ),
]


@pytest.mark.parametrize(("fields", "model", "message"), REFUSED)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], model: nn.Module | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_targets(model or Transformer(), LoRA(**{"target_modules": ["q_proj"], **fields}))


def test_an_embedding_takes_lora_alone() -> None:
    model = Transformer()
    for kind, extra in ((LoHa, {}), (LoKr, {}), (AdaLoRA, {"target_rank": 1})):
        config = kind(target_modules=["embed"], **extra)
        with pytest.raises(UsageError, match=f"embed is an Embedding, to which only LoRA goes, got {config.method}"):
            find_targets(model, config)


def test_layer_numbers_need_a_list_to_narrow() -> None:
    with pytest.raises(UsageError, match="layers_to_transform narrows a list of target_modules, got the string"):
        LoRA(target_modules="all-linear", layers_to_transform=[1])
    with pytest.raises(UsageError, match="layers_pattern 'h' says where layers_to_transform finds its"):
        LoRA(target_modules=["q_proj"], layers_pattern="h")
