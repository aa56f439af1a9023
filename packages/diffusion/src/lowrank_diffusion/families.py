"""The kinds of models that are fine-tuned: of what diffusers' pipelines for them consist."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """One kind of model.

    name: as people know it. pipeline: diffusers' class. encoders: its text encoders, each with a tokenizer beside it.
    tag: how the hub calls it. options: of the pipeline, when it is loaded or put together. prefixes: how the names of
    each network begin in a single file of the whole. repository: on the hub, whose configurations such files have.
    """

    name: str
    pipeline: str
    encoders: tuple[str, ...]
    tag: str
    options: Mapping[str, Any]
    prefixes: Mapping[str, str]
    repository: str

    @property
    def networks(self) -> tuple[str, ...]:
        return ("unet", *self.encoders, "vae")

    @property
    def parts(self) -> tuple[str, ...]:
        """The folders that a whole one has."""
        return (*self.networks, *self.tokenizers, "scheduler")

    @property
    def tokenizers(self) -> tuple[str, ...]:
        return tuple(encoder.replace("text_encoder", "tokenizer") for encoder in self.encoders)


SDXL = Family(
    "SDXL",
    "StableDiffusionXLPipeline",
    ("text_encoder", "text_encoder_2"),
    "stable-diffusion-xl",
    {"add_watermarker": False},
    {
        "unet": "model.diffusion_model.",
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
        "vae": "first_stage_model.",
    },
    "stabilityai/stable-diffusion-xl-base-1.0",
)
SD1 = Family(
    "Stable Diffusion 1",
    "StableDiffusionPipeline",
    ("text_encoder",),
    "stable-diffusion",
    {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    {
        "unet": "model.diffusion_model.",
        "text_encoder": "cond_stage_model.transformer.",
        "vae": "first_stage_model.",
    },
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
)
"""Its UNet reads the last layer of its one encoder, and neither pooled text nor sizes."""

TRAINED = "adapters are trained for SDXL and Stable Diffusion 1; give one"
"""What is said of other models, and then by which option."""


def family_named(pipeline: str) -> Family | None:
    """The family whose pipeline has this class; SDXL's other pipelines have the same networks."""
    if pipeline.startswith("StableDiffusionXL"):
        return SDXL
    return SD1 if pipeline == SD1.pipeline else None


def family_of(pipeline: Any) -> Family:
    """The family of a loaded pipeline."""
    return SDXL if "text_encoder_2" in pipeline.components else SD1
