"""Captions and pictures as SDXL's UNet sees them: embedded text, and latents."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_core.errors import LowrankError
from lowrank_diffusion.families import family_of
from lowrank_diffusion.seeds import derive_seed
from lowrank_diffusion.words import PARTS, Reader, Word


@dataclass(frozen=True)
class Text:
    """An embedded caption, or a batch of them with one more leading dimension."""

    hidden: Tensor
    """`(tokens, width)`: both encoders' next-to-last layers side by side."""
    pooled: Tensor
    """`(width of the second encoder's projection,)`; `(0,)` where there is none."""

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Text":
        return Text(self.hidden.to(device, dtype), self.pooled.to(device, dtype))

    @staticmethod
    def stacked(texts: Sequence["Text"]) -> "Text":
        return Text(torch.stack([text.hidden for text in texts]), torch.stack([text.pooled for text in texts]))

    def unstacked(self) -> list["Text"]:
        return [Text(hidden, pooled) for hidden, pooled in zip(self.hidden, self.pooled, strict=True)]


class TextEncoders:
    """The text encoders with their tokenizers. What they give is what diffusers' pipeline gives its UNet."""

    def __init__(self, tokenizers: Sequence[Any], encoders: Sequence[Any], words: Sequence[Word] = ()) -> None:
        self.encoders, self.words = tuple(encoders), tuple(words)
        self._readers = [
            Reader(tokenizer, encoder, part, self.words)
            for tokenizer, encoder, part in zip(tokenizers, encoders, PARTS[: len(encoders)], strict=True)
        ]

    @staticmethod
    def of(pipeline: Any, words: Sequence[Word] = ()) -> "TextEncoders":
        """Those of a pipeline, which read `words` besides."""
        family = family_of(pipeline)
        return TextEncoders(
            [getattr(pipeline, name) for name in family.tokenizers],
            [getattr(pipeline, name) for name in family.encoders],
            words,
        )

    def __call__(self, captions: Sequence[str]) -> Text:
        """Embed a batch; gradients flow to the encoders where they are enabled.

        transformers pools the second encoder's text at its first end token. Where there is one encoder, the text is its
        last layer, as Stable Diffusion 1 has it, and the pooled text has no numbers.
        """
        outputs = [reader(captions) for reader in self._readers]
        if len(outputs) == 1:
            hidden = outputs[0].last_hidden_state
            return Text(hidden, hidden.new_empty(len(hidden), 0))
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return Text(hidden, outputs[-1].text_embeds)

    def too_long(self, captions: Sequence[str]) -> list[str]:
        """The captions of which an encoder reads only the beginning."""
        return [caption for caption in captions if any(reader.is_too_long(caption) for reader in self._readers)]


@dataclass(frozen=True)
class Latents:
    """A picture's normal distribution in the VAE's latent space, scaled as the UNet reads it; fp32."""

    mean: Tensor
    """`(channels, height / 8, width / 8)` with SDXL's VAE."""
    std: Tensor
    """As `mean`."""


class PictureEncoder:
    """The VAE's encoder, in the VAE's own dtype (`vae_dtype`) and on its device."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    @torch.no_grad()
    def __call__(self, pixels: Tensor, names: Sequence[str]) -> list[Latents]:
        """Encode a batch of pictures.

        Args:
            pixels: `(n, 3, height, width)` from -1 to 1.
            names: of the pictures, for messages.

        Raises:
            LowrankError: the VAE makes NaN or infinity of a picture.
        """
        dtype = self.vae.dtype
        posterior = self.vae.encode(pixels.to(self.vae.device, dtype)).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        for name, finite in zip(names, (mean + std).isfinite().all(dim=(1, 2, 3)).tolist(), strict=True):
            if not finite:
                raise LowrankError(
                    f"the VAE makes NaN of {name} in {str(dtype).removeprefix('torch.')}; "
                    "set train.precision: fp32, or give another VAE as base.vae, such as madebyollin/sdxl-vae-fp16-fix"
                )
        centre, scale = self._normalisation(mean.device)
        return [Latents((m - centre) * scale, s * scale) for m, s in zip(mean, std, strict=True)]

    def _normalisation(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """What diffusers' SDXL pipeline undoes before it decodes; it knows no shift_factor, and SDXL's VAE has none."""
        config, shape = self.vae.config, (-1, 1, 1)
        scale = torch.tensor(config.scaling_factor, device=device)
        if config.get("latents_mean") is None or config.get("latents_std") is None:
            return torch.zeros((), device=device), scale
        mean, std = (torch.tensor(config[key], device=device).view(shape) for key in ("latents_mean", "latents_std"))
        return mean, scale / std


def vae_dtype(precision: str) -> torch.dtype:
    """The VAE's dtype in a run of that `train.precision`: SDXL's own VAE overflows in fp16, so fp32 unless bf16."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def sampled(latents: Sequence[Latents], seed: int, step: int, examples: Sequence[int]) -> Tensor:
    """A draw of each example's latents, `(n, channels, height, width)`, fp32; a function of (seed, step, example)."""
    draws = []
    for each, example in zip(latents, examples, strict=True):
        generator = torch.Generator().manual_seed(derive_seed(seed, "vae", step, example))
        noise = torch.randn(each.mean.shape, generator=generator)
        draws.append(each.mean + each.std * noise.to(each.mean.device))
    return torch.stack(draws)
