"""A step's folder of diffengine: PEFT's own folders of the UNet and both text encoders, drawn with by `infer`."""

import numpy as np
import pytest
import torch

from lowrank_diffusion.seeds import derive_seed

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
# diffengine's hook calls save_pretrained of each PeftModel below these names.
PLACES = {"unet": "unet", "text_encoder_one": "text_encoder", "text_encoder_two": "text_encoder_2"}
TARGETS = {"unet": ["to_q", "to_k", "to_v", "to_out.0", "conv1"]}


@pytest.mark.parametrize("method", ["LoHaConfig", "LoKrConfig", "LoraConfig"])
def test_pefts_folders_give_the_picture_that_peft_gives(made, draw, tmp_path, method):
    import peft

    pipeline = made.pipeline()
    for number, (place, name) in enumerate(PLACES.items()):
        torch.manual_seed(number)
        rank = {"lora_alpha": 4} if method == "LoraConfig" else {"alpha": 4}
        config = getattr(peft, method)(r=2, target_modules=TARGETS.get(place, ["q_proj", "fc1"]), **rank)
        adapted = peft.get_peft_model(getattr(pipeline, name), config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        adapted.save_pretrained(tmp_path / "step100" / place)
    generator = torch.Generator().manual_seed(derive_seed(0, "sample", 1, 1))
    theirs = pipeline(
        "a red circle", width=64, height=64, num_inference_steps=2, guidance_scale=5.0, generator=generator
    ).images[0]
    (picture,), result, _ = draw(tmp_path / "step100", prompts=["a red circle"], merged=False)
    assert list(result.merged) == ["unet", "text_encoder", "text_encoder_2"]
    assert np.abs(picture - np.asarray(theirs, dtype=int)).max() <= 1
    (plain,), _, _ = draw(tmp_path / "step100", prompts=["a red circle"], weights=[0.0])
    assert np.abs(picture - plain).max() > 8
