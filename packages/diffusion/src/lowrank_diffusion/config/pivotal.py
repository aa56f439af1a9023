"""A word of its own for what is learned."""

from typing import Annotated

from pydantic import Field, PositiveFloat

from lowrank_diffusion.config.section import Fraction, Section


class PivotalConfig(Section):
    """A new word, whose embeddings are trained beside the adapter (textual inversion; Gal et al., 2022)."""

    token: Annotated[str, Field(pattern=r"^[^\s,]+$")] | None = None
    """The word, as captions and prompts have it, such as `<backpack>`; without one the adapter is trained alone."""
    vectors: Annotated[int, Field(ge=1, le=64)] = 2
    """So many embeddings, and tokens of a caption's room, the word takes."""
    init: str | None = None
    """A word of one token that they start from; drawn with the spread of the base's own if not given."""
    lr: PositiveFloat = 3e-4
    until: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The share of the steps after which they stay as they are (the pivot), while the adapter goes on."""
    hold_spread: Fraction = 0.1
    """After each step their standard deviation moves so far, as a power, to that of the base's own; 0 leaves it."""
