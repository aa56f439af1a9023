"""`lowrank count-params` as its users see it."""

import csv
import json
from pathlib import Path

import pytest

# VGG16's parameters in millions by classes and gamma: Table 5 of Hyeon-Woo et al., ICLR 2022.
TABLE_5 = {
    "10": {
        "0.1": 1.55,
        "0.2": 2.33,
        "0.3": 3.31,
        "0.4": 4.45,
        "0.5": 5.79,
        "0.6": 7.33,
        "0.7": 9.01,
        "0.8": 10.9,
        "0.9": 12.92,
    },
    "100": {
        "0.1": 1.59,
        "0.2": 2.38,
        "0.3": 3.36,
        "0.4": 4.5,
        "0.5": 5.84,
        "0.6": 7.38,
        "0.7": 9.05,
        "0.8": 10.94,
        "0.9": 12.96,
    },
}
ORIGINAL = {"10": 15.25, "100": 15.30}


@pytest.fixture
def count(lowrank):
    def count(*arguments: str):
        outcome = lowrank("count-params", *arguments, "--json")
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out)

    return count


@pytest.mark.parametrize("classes", TABLE_5)
def test_vgg16_has_the_parameters_of_the_papers_table_5(count, classes):
    rows = TABLE_5[classes]
    reports = count("vgg16", "--classes", classes, "--method", "fedpara", "--gamma", ",".join(rows))["reports"]
    for report, millions in zip(reports, rows.values(), strict=True):
        assert abs(round(report["params"] / 1e6, 2) - millions) < 0.0101
        assert round(report["original_params"] / 1e6, 2) == ORIGINAL[classes]


@pytest.mark.slow
def test_sdxl_s_attention(count):
    loha = count("sdxl-unet", "--method", "loha", "--rank", "8", "--target", "attention")
    assert (len(loha["layers"]), loha["trainable_params"]) == (560, 23_224_320)
    assert loha["original_params"] == 2_567_463_684
    assert loha["params"] == 2_567_463_684 + 23_224_320
    assert count("sdxl-unet", "--method", "lora", "--rank", "8")["trainable_params"] == 11_612_160


@pytest.mark.slow
def test_sdxl_is_the_unet_and_both_text_encoders(count):
    whole = count("sdxl", "--method", "lora", "--rank", "4", "--target", "attention+mlp")
    assert whole["original_params"] == 2_567_463_684 + 123_060_480 + 694_659_840
    names = {layer["name"].partition(".")[0] for layer in whole["layers"]}
    assert names == {"unet", "text_encoder", "text_encoder_2"}
    # Four of attention and two of the MLP, in 12 and 32 layers.
    assert sum(layer["name"].startswith("text_encoder") for layer in whole["layers"]) == 6 * (12 + 32)


def test_json_has_the_documented_keys(count):
    tree = count("mlp", "--method", "fedpara", "--gamma", "0.5")
    documented = "model method original_params params trainable_params ratio bytes layers communication"
    assert set(documented.split()) <= tree.keys()
    documented = "name type shape rank max_rank original_params params"
    assert set(documented.split()) <= tree["layers"][0].keys()
    assert tree["bytes"] == 4 * tree["params"]
    assert tree["communication"] is None


def test_pfedpara_keeps_half_of_its_factors(count):
    tree = count("mlp", "--method", "pfedpara", "--gamma", "0.5")
    assert (tree["original_params"], tree["transferred_params"]) == (216_894, 63_646)
    assert [layer["rank"] for layer in tree["layers"]] == [56, 16]
    assert sum(layer["local_params"] for layer in tree["layers"]) == tree["params"] - 63_646


def test_traffic_is_twice_what_travels_for_each_client_and_round(count):
    tree = count("vgg16", "--method", "fedpara", "--rounds", "200", "--clients-per-round", "16", "--dtype", "fp16")
    assert tree["bytes"] == 2 * tree["transferred_params"]
    assert tree["communication"] == {
        "rounds": 200,
        "clients_per_round": 16,
        "bytes_per_round": 2 * 16 * tree["bytes"],
        "total_bytes": 200 * 2 * 16 * tree["bytes"],
    }


def test_a_budget_of_bytes_is_read_in_the_dtype(count):
    tree = count("cnn", "--method", "lora", "--budget", "40KB", "--dtype", "bf16", "--target", "all")
    assert tree["trainable_params"] <= 20_000
    rank = tree["layers"][0]["rank"]
    assert count("cnn", "--method", "lora", "--rank", str(rank + 1), "--target", "all")["trainable_params"] > 20_000
    assert tree["budget"] == "40KB"


def test_a_budget_of_factors_is_the_whole_models(count):
    tree = count("vgg16", "--method", "fedpara", "--budget", "2M")
    assert 1_980_000 < tree["params"] <= 2_000_000
    assert tree["rule"].startswith("gamma 0.1")


@pytest.mark.slow
def test_adalora_has_a_final_budget(count):
    tree = count("sdxl-unet", "--method", "adalora", "--rank", "12", "--target-rank", "8")
    final = count("sdxl-unet", "--method", "lora", "--rank", "8")
    # AdaLoRA holds a value for each direction too.
    assert tree["final_params"] == final["trainable_params"] + 560 * 8
    assert tree["rule"] == "rank 12 to 8"


@pytest.mark.slow
def test_dora_adds_a_magnitude_for_each_output(count):
    dora, lora = (count("sdxl-unet", "--method", method, "--rank", "4") for method in ("dora", "lora"))
    outputs = sum(layer["shape"][0] for layer in lora["layers"])
    assert dora["trainable_params"] - lora["trainable_params"] == outputs
    assert dora["method"] == "lora+dora"


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("all-conv", ["features.0", "features.4", "features.8"]),
        ("all-linear", ["head"]),
        (r"features\.[48]", ["features.4", "features.8"]),
    ],
)
@pytest.mark.parametrize("method", ["lora", "fedpara"])
def test_targets(count, target, names, method):
    tree = count("cnn", "--method", method, "--rank", "2", "--target", target)
    assert [layer["name"] for layer in tree["layers"]] == names


def test_the_table_of_one_case(lowrank):
    out = lowrank("count-params", "vgg16", "--method", "fedpara", "--gamma", "0.1").out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for line in [
        "vgg16 fedpara, gamma 0.1",
        "original params 15,253,578",
        "params 1,545,442",
        "transferred, float32 6.18 MB",
        "features.40 Conv2d 512x512x3x3 52 512 2,359,296 155,168",
        "classifier.6 stays as it is: excluded",
    ]:
        assert line in lines


@pytest.mark.slow
def test_layers_alike_share_a_row_unless_each_is_asked_for(lowrank):
    grouped = lowrank("count-params", "sdxl-unet", "--method", "loha").out
    assert len(grouped.splitlines()) < 45
    assert "*.attn1.to_out.0" in grouped
    every = lowrank("count-params", "sdxl-unet", "--method", "loha", "--layers").out
    assert len(every.splitlines()) > 560
    assert "mid_block.attentions.0.transformer_blocks.9.attn2.to_out.0" in every


def test_comparing_gives_a_row_to_every_method(lowrank):
    out = lowrank("count-params", "cnn", "--compare", "--rank", "2,4", "--target", "all", "--rounds", "5").out
    rows = [line.split()[:3] for line in out.splitlines()]
    assert ["fedpara", "rank", "4"] in rows
    assert ["loha+dora", "rank", "2"] in rows
    assert rows[0][:2] == ["method", "rule"]
    assert "traffic" in out.splitlines()[0]


def test_comparing_under_gamma_leaves_adapters_out(count):
    reports = count("mlp", "--compare", "--gamma", "0.5")["reports"]
    methods = {report["method"] for report in reports}
    assert {"original", "lowrank", "fedpara", "pfedpara"} <= methods
    assert not {"lora", "loha", "lokr", "adalora"} & methods


def test_csv_has_a_row_for_every_changed_layer(lowrank, tmp_path):
    path = tmp_path / "layers.csv"
    lowrank("count-params", "cnn", "--method", "fedpara,lora", "--rank", "2", "--target", "all", "--csv", str(path))
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    assert [row["name"] for row in rows if row["method"] == "lora"] == [
        "features.0",
        "features.4",
        "features.8",
        "head",
    ]
    assert rows[0].keys() == {
        *("model", "method", "rule", "name", "type", "shape", "rank", "max_rank", "original_params", "params")
    }
    assert rows[-1]["shape"] == "10x2048"


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plotting_writes_a_picture(lowrank, tmp_path, ending):
    path = tmp_path / f"costs.{ending}"
    outcome = lowrank("count-params", "mlp", "--method", "original,fedpara,lora", "--rank", "2,4", "--plot", str(path))
    assert outcome.code == 0
    assert path.stat().st_size > 5_000
    assert f"picture: {path}" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ([], 2, "count-params takes a MODEL, such as vgg16 or sdxl-unet"),
        (["vgg61"], 2, "unknown model 'vgg61'; nearest: vgg16"),
        (["zzz"], 2, "unknown model 'zzz'; presets are vgg16"),
        (["torchvision:resnet19"], 2, "torchvision has no model 'resnet19'; the nearest names are resnet"),
        (["./nowhere"], 1, "there is no folder ./nowhere; give a folder with a config.json"),
        (["sdxl", "--classes", "3"], 2, "--classes is for vgg16, resnet18, lstm, mlp, cnn and torchvision's models"),
        (["cnn", "--method", "lroa"], 2, "unknown method 'lroa'; nearest: lora"),
        (["cnn", "--method", "fedpara", "--gamma", "1", "--rank", "2"], 2, "one rank rule at a time, got --rank and"),
        (["cnn", "--method", "lora", "--gamma", "0.1"], 2, "--gamma is a rank rule of lowrank, fedpara, pfedpara"),
        (["cnn", "--rank", "2"], 2, "--rank without a method; add --method"),
        (["cnn", "--method", "lora", "--rank", "two"], 2, "--rank takes whole numbers separated by commas, got 'two'"),
        (["cnn", "--method", "fedpara", "--gamma", "x"], 2, "--gamma takes numbers separated by commas, got 'x'"),
        (["cnn", "--method", "fedpara", "--gamma", "2"], 2, "gamma must lie between 0 and 1, got 2.0"),
        (["cnn", "--method", "lora", "--rank", "0"], 2, "rank must be at least 1, got 0"),
        (["cnn", "--method", "lora", "--rank", "2,"], 2, "--rank takes values separated by commas, got '2,'"),
        (["cnn", "--method", "lora", "--target", "q_proj"], 2, "matches no module"),
        (["cnn", "--method", "fedpara", "--target", "q_proj"], 2, "the target 'q_proj' matches no layer; the nearest"),
        (["cnn", "--method", "fedpara", "--target", "("], 2, "the target '(' is not a regular expression"),
        (["cnn", "--method", "lora", "--target", "attention"], 2, "the target 'attention' matches no layer of this"),
        (["cnn", "--method", "lora", "--budget", "10"], 1, "a budget of 10 parameters is below lora's smallest"),
        (["cnn", "--method", "fedpara", "--budget", "10"], 1, "a budget of 10 parameters is below the smallest size"),
        (["cnn", "--method", "lora", "--budget", "many"], 2, "budget 'many' is neither a number of parameters"),
        (["cnn", "--dtype", "int3"], 2, "--dtype must be one of float64, float32"),
        (["cnn", "--input", "3x"], 2, "--input takes CHANNELSxHEIGHTxWIDTH, such as 3x32x32"),
        (["vgg16", "--input", "3x64x64"], 1, "model 'vgg16' reads 32x32 pixels"),
        (["cnn", "--rounds", "0"], 2, "--rounds must be at least 1, got 0"),
        (["cnn", "--plot", "costs.txt"], 2, "--plot writes .png, .svg, .pdf, got 'costs.txt'"),
        (["cnn", "--plot", "none/costs.png"], 1, "there is no folder none; make it first"),
        (["cnn", "--csv", "none/layers.csv"], 1, "--csv cannot write to none/layers.csv"),
    ],
)
def test_faults_are_told_in_a_sentence(lowrank, tmp_path, monkeypatch, arguments, code, sentence):
    monkeypatch.chdir(tmp_path)
    outcome = lowrank("count-params", *arguments)
    assert (outcome.code, outcome.out) == (code, "")
    assert sentence in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_folder_without_a_configuration_says_which_of_its_parts_has_one(lowrank, tmp_path):
    outcome = lowrank("count-params", str(tmp_path))
    assert outcome.code == 1
    assert f"no config.json in {tmp_path}; give a folder of a saved model" in outcome.err
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{")
    assert f"give one of its parts, such as {tmp_path / 'unet'}" in lowrank("count-params", str(tmp_path)).err
    assert "config.json is not JSON" in lowrank("count-params", str(tmp_path / "unet")).err


def test_an_unknown_class_of_diffusers_is_named(lowrank, tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "NoSuchModel"}')
    outcome = lowrank("count-params", str(tmp_path))
    assert outcome.code == 1
    assert "describes NoSuchModel, which is no network of diffusers" in outcome.err


def test_an_id_that_the_hub_does_not_give_says_so(lowrank, monkeypatch):
    import huggingface_hub

    def refuse(*_: object) -> Path:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    outcome = lowrank("count-params", "owner/name/unet")
    assert outcome.code == 1
    assert "fetching unet/config.json of owner/name from the Hugging Face hub" in outcome.err
    assert "unet/config.json of owner/name cannot be fetched from the Hugging Face hub (offline)" in outcome.err
