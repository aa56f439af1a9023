"""LoRA on grouped convolutions: PEFT's layout and ours."""

import copy
import warnings

import pytest
import torch

import lowrank_core
from lowrank_core import LoHa, LoRA
from lowrank_core.errors import LowrankError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def model():
    return torch.nn.Sequential(torch.nn.Conv2d(6, 9, 3, groups=3), torch.nn.Conv2d(9, 4, 1)).eval()


@pytest.mark.parametrize("form", ["peft", "lora", "kohya"])
@pytest.mark.parametrize(
    "config",
    [
        LoRA(rank=2, alpha=3, target_modules=["0", "1"], init_weights="random"),
        LoRA(rank=2, alpha=3, target_modules=["0", "1"], init_weights="random", rank_stabilized=True),
        LoHa(rank=2, alpha=3, target_modules=["0", "1"], init_weights="random"),
    ],
    ids=["lora", "rslora", "loha"],
)
def test_ours_loads_in_peft_and_comes_back(model, tmp_path, form, config):
    x = torch.randn(2, 6, 5, 5)
    ours = lowrank_core.inject(copy.deepcopy(model), config).eval()
    path = tmp_path / ("a.safetensors" if form == "kohya" else "a")
    lowrank_core.save(ours, path, form)
    again = lowrank_core.load(copy.deepcopy(model), path).eval()
    torch.testing.assert_close(again(x), ours(x), rtol=1e-4, atol=1e-5)
    if form != "kohya":
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), path).eval()
        torch.testing.assert_close(theirs(x), ours(x), rtol=1e-4, atol=1e-5)


def test_a_peft_lora_that_mixes_the_groups_is_refused(model, tmp_path):
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=3, target_modules=["0"]))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(LowrankError, match="its lora_A mixes the inputs of the groups as only PEFT does"):
        lowrank_core.load(model, tmp_path)
