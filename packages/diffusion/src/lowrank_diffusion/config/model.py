"""What is fine-tuned, and what is trained in place of its weights."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from lowrank_diffusion.config.section import Section, Share


class BaseConfig(Section):
    """What is fine-tuned."""

    path: str = "tiny"
    """A diffusers folder, a hub id or a whole .safetensors file of an SDXL or Stable Diffusion 1, or `tiny`, which is
    shipped with this package."""
    config: str | None = None
    """For a file: the diffusers folder or hub id with its configurations and tokenizers; those of SDXL or
    Stable Diffusion 1.5 on the hub if not given."""
    vae: str | None = None
    """A VAE of its own, as folder, file or hub id; SDXL's is not fit for fp16."""
    revision: str | None = None
    """Of the hub's repository."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """What the UNet's linear layers hold their frozen weights in."""


class AdapterSettings(Section):
    """What is trained in place of the weights."""

    method: Literal["lora", "loha", "lokr", "adalora"] = "loha"
    rank: PositiveInt = 8
    alpha: PositiveFloat = 8.0
    target: list[str] | str = ["to_q", "to_k", "to_v", "to_out.0"]
    """The UNet's layers: name suffixes, a regular expression, or `all-linear`."""
    rank_pattern: dict[str, PositiveInt] = {}
    alpha_pattern: dict[str, PositiveFloat] = {}
    """A rank and an alpha of their own for layers whose names end in a match of the key, a regular expression."""
    dora: bool = False
    """Train each output's magnitude beside the direction that the method changes (weight decomposition)."""
    dropout: Share = 0.0
    """Of the adapter's input."""
    rank_dropout: Share = 0.0
    """Of whole outputs of an adapter."""
    module_dropout: Share = 0.0
    """The chance that a layer goes without its adapter for one forward."""
    factor: Annotated[int, Field(ge=-1)] = -1
    """LoKr: the size of the smaller Kronecker side; -1 takes the two sides as alike as can be."""
    target_rank: PositiveInt | None = None
    """AdaLoRA: the mean rank at the end; half of `rank` when not given."""
    text_encoders: bool = False
    """Train an adapter on the text encoders too."""
    text_target: list[str] | str = ["q_proj", "k_proj", "v_proj", "out_proj"]
    init_from: str | None = None
    """Go on from the adapter in this run's or PEFT folder or file, or at hf://OWNER/NAME on the hub."""

    @property
    def described(self) -> str:
        """The method as `lowrank count-params` calls it."""
        return f"{self.method}+dora" if self.dora else self.method

    @property
    def in_peft(self) -> bool:
        """Whether PEFT has a form for it; of methods with magnitudes it has LoRA alone."""
        return not self.dora or self.method == "lora"
