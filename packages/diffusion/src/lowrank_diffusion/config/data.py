"""What is learned from: captioned pictures, and pictures of their class."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from lowrank_diffusion.config.section import Fraction, NumberFromZero, Pixels, Section, Share


class DataConfig(Section):
    """Which captioned pictures, and how they are cut."""

    path: str = "quickstart"
    """A folder of pictures with .txt captions or metadata.jsonl, a folder or file of parquet, a hub id; or
    `quickstart`, pictures that this package draws."""
    image_key: str | None = None
    caption_key: str | None = None
    """The columns; found by their types when not given."""
    caption: str | None = None
    """One caption for every picture that has none."""
    trigger: Annotated[str, Field(pattern=r"\S")] | None = None
    """A word for what is learned: it stands for `[trigger]` in captions, and before those that lack both."""
    caption_templates: list[str] = []
    """Texts around `{caption}`, one of which is drawn for each example."""
    shuffle_tags: bool = False
    """Captions are tags between commas, which are put in another order each time."""
    keep_tags: NonNegativeInt = 0
    """So many of the first stay where they are."""
    tag_dropout: Share = 0.0
    """The chance of each of the others to be left out."""
    resolution: Pixels = 1024
    """Pictures have about so many pixels squared, whatever their shape."""
    buckets: bool = True
    """Keep each picture near its own shape; off, all are square."""
    bucket_step: Pixels = 64
    """Sides are multiples of this."""
    max_aspect: Annotated[float, Field(ge=1)] = 2.0
    """The longer side is at most so many times the shorter."""
    crop: Literal["centre", "random"] = "centre"
    flip: Fraction = 0.0
    """The chance that a picture is mirrored."""
    mask: Literal["none", "alpha", "file"] = "none"
    """What counts in the loss: what is opaque, or what is white in `a-masklabel.png` beside `a.jpg`."""
    unmasked_weight: Fraction = 0.0
    """How much the rest counts."""
    background: str = "white"
    """What lies behind transparent pictures: a colour's name or #rrggbb."""
    repeats: PositiveInt = 1
    """How often an epoch shows each picture."""
    caption_dropout: Fraction = 0.1
    """The chance that a caption is left out, which guidance needs."""
    dropped_caption: Literal["zeros", "empty"] = "zeros"
    """What stands for it: zeros, as diffusers' pipeline has it, or the encoded empty text, as ComfyUI has it."""
    held_out: Share = 0.1
    """The share of pictures kept for the validation loss; at least one where above 0."""
    tolerated_broken: Fraction = 0.0
    """The share of pictures that may be unreadable; they are named and left out."""
    max_images: PositiveInt | None = None
    """Only the first so many after a seeded shuffle."""

    @model_validator(mode="after")
    def _templates_hold_the_caption(self) -> "DataConfig":
        for template in self.caption_templates:
            if "{caption}" not in template:
                raise ValueError(
                    f"caption_templates: {template!r} does not say where the caption goes; add {{caption}}"
                )
        return self


class PriorConfig(Section):
    """Pictures of the subject's class, which keep it as the base draws it (DreamBooth; Ruiz et al., 2022)."""

    caption: str | None = None
    """Of the class, such as `a photo of a dog`; without one there are no class pictures."""
    path: str | None = None
    """Their folder; what it lacks of `images` the base draws, into it."""
    images: PositiveInt = 100
    weight: PositiveFloat = 1.0
    """How often their loss counts."""
    steps: PositiveInt = 25
    guidance: NumberFromZero = 5.0
    """As they are drawn."""

    @model_validator(mode="after")
    def _has_a_folder(self) -> "PriorConfig":
        if self.caption is not None and self.path is None:
            raise ValueError("caption is given, but no path; name a folder for pictures of the class")
        return self
