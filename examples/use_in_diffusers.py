"""The adapter of a `lowrank diffusion train` run in diffusers and in PEFT, and how far their pictures are from ours."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

import lowrank_core
from lowrank_diffusion.base import load_base
from lowrank_diffusion.load import load_config


def main(run: Path, prompt: str) -> None:
    base = load_config(str(run / "config.yaml")).base

    def pipeline() -> Any:
        # Anywhere else: StableDiffusionXLPipeline.from_pretrained(the base).
        return load_base(base.path, base.vae, base.revision, torch.float32, print, config=base.config)

    def drawn(pipe: Any) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        made = pipe(prompt, num_inference_steps=10, height=64, width=64, generator=generator, output_type="np")
        return made.images[0]

    ours, theirs, with_peft = pipeline(), pipeline(), pipeline()
    without = drawn(ours)
    lowrank_core.load(ours.unet, run / "unet")
    plain = next(run.glob("*_lora.safetensors"), None)
    if plain is None:
        sys.exit(f"{run} has no plain LoRA, as runs of a LoKr have none; take a run of another method")
    theirs.load_lora_weights(str(run), weight_name=plain.name)
    with_peft.unet = PeftModel.from_pretrained(with_peft.unet, str(run / "unet"))
    picture = drawn(ours)
    print(f"the adapter changes a pixel by {np.abs(picture - without).mean():.4f} on average, of 1")
    print(f"diffusers, the plain LoRA: {np.abs(drawn(theirs) - picture).max():.0e} apart from ours at most")
    print(f"PEFT, the LoHa itself: {np.abs(drawn(with_peft) - picture).max():.0e} apart from ours at most")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: use_in_diffusers.py RUN [PROMPT]; make RUN with lowrank diffusion train --out RUN")
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "a house on a pink background")
