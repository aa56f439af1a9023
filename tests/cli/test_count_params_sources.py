"""What `lowrank count-params` imports, and the models of other libraries it counts."""

import json
import subprocess
import sys

import pytest

IMPORTED = """
import json, sys
from lowrank_cli.main import main
try:
    main(sys.argv[1:])
finally:
    slow = "torch._dynamo sympy diffusers transformers torchvision flwr peft".split()
    print(json.dumps([name for name in slow if name in sys.modules]), file=sys.stderr)
"""

SMALL_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["vgg16", "--method", "lowrank,fedpara,pfedpara", "--gamma", "0.1"],
        ["lstm", "--method", "fedpara"],
        ["sdxl-unet", "--method", "lora,loha,lokr,adalora,dora", "--budget", "10M"],
    ],
)
def test_counting_imports_torch_and_little_else(arguments):
    command = [sys.executable, "-c", IMPORTED, "count-params", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr.splitlines()[-1]) == []


@pytest.mark.slow
def test_a_folder_of_transformers(lowrank, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL_LLAMA))
    outcome = lowrank("count-params", str(tmp_path), "--method", "lora", "--rank", "2", "--json")
    tree = json.loads(outcome.out)
    assert tree["target"] == "attention"
    assert {layer["name"].rpartition(".")[2] for layer in tree["layers"]} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    # 32 -> 32 twice, 32 -> 16 twice, in two layers.
    assert tree["trainable_params"] == 2 * 2 * (2 * (32 + 32) + 2 * (32 + 16))
    assert tree["flops"]["original"] > 2 * 128 * tree["original_params"] * 0.5
    linear = lowrank("count-params", str(tmp_path), "--method", "lora", "--target", "all-linear", "--json")
    assert "lm_head" not in {layer["name"] for layer in json.loads(linear.out)["layers"]}


@pytest.mark.slow
def test_a_folder_that_transformers_does_not_know(lowrank, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nosuch"}')
    outcome = lowrank("count-params", str(tmp_path))
    assert outcome.code == 1
    assert f"{tmp_path / 'config.json'} describes no model of transformers" in outcome.err


@pytest.mark.slow
def test_models_of_torchvision(lowrank):
    tree = json.loads(lowrank("count-params", "torchvision:vgg11", "--method", "lora", "--rank", "1", "--json").out)
    assert (tree["original_params"], tree["target"]) == (132_863_336, "all")
    ten = json.loads(lowrank("count-params", "torchvision:vgg11", "--classes", "10", "--json").out)
    assert ten["original_params"] == 132_863_336 - 4097 * 990


@pytest.mark.slow
def test_a_model_whose_forward_cannot_run_is_counted_without_flops(lowrank):
    outcome = lowrank("count-params", "torchvision:alexnet", "--input", "3x16x16", "--quiet", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["flops"] is None
    outcome = lowrank("count-params", "torchvision:alexnet", "--input", "3x16x16")
    assert "FLOPs are not counted: its forward does not run on the meta device" in outcome.err
