"""PEFT folders: PEFT's load here and ours there, and nothing of them is lost on the way through."""

import copy
import json
import warnings
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import lowrank_core
from lowrank_core import AdaLoRA, LoHa, LoKr, LoRA
from lowrank_core.errors import LowrankError
from lowrank_core.files import read, write

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

TARGETS = ["conv_in", "pointwise", "to_q", "to_out.0", "head"]
PATTERNS = {"rank_pattern": {"to_q": 3, r"mid_blocks\.1\.to_out\.0": 5}, "alpha_pattern": {"head": 3.0, "to_q": 7}}
THEIRS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, lora_dropout=0.1, **PATTERNS),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_rslora=True),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_dora=True),
    "loha": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=TARGETS, rank_dropout=0.1, **PATTERNS),
    "loha-tucker": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=TARGETS, use_effective_conv2d=True),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=TARGETS, decompose_factor=2, **PATTERNS),
    "lokr-both": lambda: peft.LoKrConfig(
        r=1, alpha=3, target_modules=TARGETS, decompose_both=True, use_effective_conv2d=True
    ),
    "lokr-whole": lambda: peft.LoKrConfig(r=16, alpha=5, target_modules=TARGETS, use_effective_conv2d=True),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=6, total_step=90, tinit=10, tfinal=20, target_modules=TARGETS
    ),
    "saved": lambda: peft.LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["head"]),
}


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def theirs(net, kind):
    """PEFT's own model, with random factors."""
    model = peft.get_peft_model(copy.deepcopy(net), THEIRS[kind]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.normal_(std=0.4)
    return model.eval()


@pytest.mark.parametrize("kind", THEIRS)
def test_what_peft_writes_loads_here_with_equal_outputs(net, images, tmp_path, quiet, kind):
    model = theirs(net, kind)
    model.save_pretrained(tmp_path)
    ours = lowrank_core.load(copy.deepcopy(net), tmp_path).eval()
    torch.testing.assert_close(ours(images), model(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", THEIRS)
def test_reading_and_writing_keeps_every_bit_and_every_field(net, tmp_path, quiet, kind):
    theirs(net, kind).save_pretrained(tmp_path / "theirs")
    write(read(tmp_path / "theirs"), tmp_path / "ours", "peft")
    same_folder(tmp_path / "theirs", tmp_path / "ours")


def same_folder(first, second):
    fields = [json.loads((folder / "adapter_config.json").read_text()) for folder in (first, second)]
    assert fields[0] == fields[1]
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (first, second)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


OURS = {
    "lora": LoRA(rank=4, alpha=6, target_modules=TARGETS, **PATTERNS),
    "rslora": LoRA(rank=4, alpha=6, target_modules=TARGETS, rank_stabilized=True),
    "dora": LoRA(rank=4, alpha=6, target_modules=TARGETS, weight_decompose="out"),
    "loha": LoHa(rank=3, alpha=5, target_modules=TARGETS, **PATTERNS),
    "loha-tucker": LoHa(rank=3, alpha=5, target_modules=TARGETS, tucker=True),
    "lokr": LoKr(rank=2, alpha=3, target_modules=TARGETS, factor=2, **PATTERNS),
    "lokr-both": LoKr(rank=1, alpha=3, target_modules=TARGETS, decompose_both=True, tucker=True),
    "lokr-whole": LoKr(rank=16, alpha=5, target_modules=TARGETS),
    "adalora": AdaLoRA(rank=4, target_rank=2, alpha=6, target_modules=TARGETS),
    "saved": LoRA(rank=2, target_modules=["to_q"], modules_to_save=["head"]),
}


@pytest.mark.parametrize("kind", OURS)
def test_what_we_write_loads_in_peft_and_here_with_equal_outputs(net, adapted, images, tmp_path, quiet, kind):
    model = adapted(OURS[kind]).eval()
    lowrank_core.save(model, tmp_path / "adapter")
    again = lowrank_core.load(copy.deepcopy(net), tmp_path / "adapter").eval()
    assert torch.equal(again(images), model(images))
    peers = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "adapter").eval()
    torch.testing.assert_close(peers(images), model(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [LoHa, LoKr, partial(AdaLoRA, target_rank=1)])
def test_what_peft_has_no_dora_for_is_the_equal_lora_with_dora_there(net, adapted, images, tmp_path, quiet, method):
    model = adapted(method(rank=2, alpha=3, target_modules=TARGETS, weight_decompose="out")).eval()
    lowrank_core.save(model, tmp_path / "lora", "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["use_dora"]
    peers = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "lora").eval()
    assert (net.eval()(images) - model(images)).abs().max() > 0.1
    torch.testing.assert_close(peers(images), model(images), rtol=1e-4, atol=1e-5)


def test_a_shrunk_adalora_loads_in_peft_and_here(net, adapted, images, tmp_path, quiet):
    model = adapted(OURS["adalora"]).eval()
    with torch.no_grad():
        for index, adapter in enumerate(lowrank_core.adapters_of(model).values()):
            kept = slice(0, 1 + index % 4)
            for name, held in {
                "lora_A": adapter.lora_A[kept],
                "lora_B": adapter.lora_B[:, kept],
                "lora_E": adapter.lora_E[kept],
            }.items():
                setattr(adapter, name, torch.nn.Parameter(held.clone()))
    lowrank_core.save(model, tmp_path / "adapter")
    again = lowrank_core.load(copy.deepcopy(net), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(images), model(images))
    peers = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "adapter").eval()
    torch.testing.assert_close(peers(images), model(images), rtol=1e-5, atol=1e-6)


def test_an_adalora_that_peft_has_pruned_loads_here_and_goes_back(net, images, tmp_path, quiet):
    model = theirs(net, "adalora")
    names = [name.removesuffix(".default") for name, _ in model.base_model.model.named_parameters() if "lora_E" in name]
    pattern = {name: [True, index % 2 == 0, False, True] for index, name in enumerate(names)}
    model.peft_config["default"].rank_pattern = pattern
    model.save_pretrained(tmp_path / "theirs")
    ours = lowrank_core.load(copy.deepcopy(net), tmp_path / "theirs").eval()
    peers = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "theirs").eval()
    torch.testing.assert_close(ours(images), peers(images), rtol=1e-5, atol=1e-6)
    write(read(tmp_path / "theirs"), tmp_path / "ours", "peft")
    same_folder(tmp_path / "theirs", tmp_path / "ours")


def test_an_adalora_layer_without_directions_left_adds_nothing(net, images, tmp_path, quiet):
    model = theirs(net, "adalora")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_E" in name:
                parameter.zero_()
    names = [name.removesuffix(".default") for name, _ in model.base_model.model.named_parameters() if "lora_E" in name]
    model.peft_config["default"].rank_pattern = {name: [False] * 4 for name in names}
    model.save_pretrained(tmp_path)
    ours = lowrank_core.load(copy.deepcopy(net), tmp_path).eval()
    torch.testing.assert_close(ours(images), net(images))


def test_an_unknown_field_is_kept(net, tmp_path, quiet):
    theirs(net, "loha").save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "adapter_config.json"
    fields = {**json.loads(path.read_text()), "from_the_future": {"a": [1, None]}}
    path.write_text(json.dumps(fields))
    write(read(tmp_path / "theirs"), tmp_path / "ours", "peft")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text()) == fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "OFT"}, "peft_type 'OFT'"),
        ({"lora_bias": True}, "sets lora_bias, which is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "starts from pissa_niter_4, which changes the base weights"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern of adapter_config.json '\\(' is not a regular expression"),
        ({"r": "4"}, "a value of the wrong type: r is '4', expected a number; correct it"),
        ({"rank_pattern": {"head": "4"}}, "rank_pattern is {'head': '4'}, expected names with numbers"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes', expected true or false"),
        ({"target_r": 0.5, "peft_type": "ADALORA"}, "target_r is 0.5, expected a whole number; correct it"),
        ({"peft_type": "x" * 500}, "is of peft_type 'x{199}...; this reads LORA"),
        ({"r": 0}, "rank must be at least 1, got 0"),
        ({"lora_alpha": -1}, "alpha must be positive, got -1"),
        ({"r": 5, "rank_pattern": {}}, "has factors of rank [34], but adapter_config.json says 5"),
    ],
)
def test_a_configuration_that_cannot_be_meant(net, tmp_path, quiet, fields, message):
    theirs(net, "lora").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(LowrankError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoRA(target_modules=TARGETS, rank=2, tucker=True), "PEFT has no Tucker form of LoRA"),
        (
            LoHa(target_modules=TARGETS, rank=2, weight_decompose="out"),
            r"for loha; write the equal LoRA with DoRA \(--to lora\), write a kohya file, or merge",
        ),
        (
            AdaLoRA(target_modules=TARGETS, target_rank=1, weight_decompose="out"),
            r"no DoRA for adalora; write the equal LoRA with DoRA \(--to lora\), or merge the adapter",
        ),
        (
            LoRA(target_modules=TARGETS, rank=2, weight_decompose="in"),
            "along the inputs for lora; write a kohya file, or merge",
        ),
        (AdaLoRA(target_modules=TARGETS, rank=9, rank_pattern={"head": 8}), r"gives 8, 9; write .* \(format .lora.\)"),
        (
            AdaLoRA(target_modules=TARGETS, rank=9, alpha_pattern={"head": 3}),
            r"the same alpha, .* gives 3, 8; write it as",
        ),
    ],
)
def test_what_peft_cannot_say_is_refused(adapted, tmp_path, config, message):
    with pytest.raises(LowrankError, match=message):
        lowrank_core.save(adapted(config), tmp_path / "adapter")


class Words(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(11, 6)
        self.proj = torch.nn.Linear(6, 5)

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return None

    def forward(self, ids):
        return self.proj(self.embed_tokens(ids))


def test_embeddings_and_the_weights_that_peft_writes_with_them(tmp_path, quiet):
    words, ids = Words().eval(), torch.arange(11)
    model = peft.get_peft_model(copy.deepcopy(words), peft.LoraConfig(r=2, target_modules=["embed_tokens", "proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.save_pretrained(tmp_path / "theirs")
    assert any("base_layer" in key for key in read(tmp_path / "theirs")[0].saved)
    ours = lowrank_core.load(copy.deepcopy(words), tmp_path / "theirs").eval()
    torch.testing.assert_close(ours(ids), model(ids), rtol=1e-5, atol=1e-6)
    lowrank_core.save(ours, tmp_path / "ours")
    peers = peft.PeftModel.from_pretrained(copy.deepcopy(words), tmp_path / "ours").eval()
    torch.testing.assert_close(peers(ids), model(ids), rtol=1e-5, atol=1e-6)
    with pytest.raises(LowrankError, match="the adapter comes with another embed_tokens than the model's"):
        lowrank_core.load(Words(), tmp_path / "theirs")


def test_trained_biases_are_kept_in_files_and_not_loaded(net, tmp_path, quiet):
    config = peft.LoraConfig(r=2, target_modules=["to_q"], bias="lora_only")
    peft.get_peft_model(copy.deepcopy(net), config).save_pretrained(tmp_path / "theirs")
    write(read(tmp_path / "theirs"), tmp_path / "ours", "peft")
    same_folder(tmp_path / "theirs", tmp_path / "ours")
    with pytest.raises(LowrankError, match="has trained parameters that modules_to_save does not name"):
        lowrank_core.load(net, tmp_path / "theirs")
