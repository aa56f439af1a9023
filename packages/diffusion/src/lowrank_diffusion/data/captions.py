"""What a step says of a picture: its caption with trigger word and template, its tags shuffled, or nothing."""

import random
from collections.abc import Sequence

from lowrank_diffusion.config import DataConfig
from lowrank_diffusion.seeds import derive_seed

TRIGGER = "[trigger]"
"""Where in a caption the trigger word goes."""
CAPTION = "{caption}"
"""Where in a template the caption goes."""


class Captions:
    """Tags are shuffled and left out first, then the trigger word comes in, then a template around all."""

    def __init__(self, data: DataConfig, seed: int) -> None:
        self._data, self._seed = data, seed
        self._templates = data.caption_templates or [CAPTION]

    def of(self, caption: str, step: int, place: int) -> str | None:
        """What an example is told: a function of the seed, the step and the place; None where it is told nothing."""
        data, rng = self._data, random.Random(derive_seed(self._seed, "caption", step, place))
        if rng.random() < data.caption_dropout:
            return None
        if data.shuffle_tags or data.tag_dropout:
            tags = _tags(caption)
            kept, others = tags[: data.keep_tags], tags[data.keep_tags :]
            others = [tag for tag in others if rng.random() >= data.tag_dropout]
            if data.shuffle_tags:
                rng.shuffle(others)
            caption = ", ".join([*kept, *others])
        return self._within(rng.choice(self._templates), caption)

    def plain(self, caption: str) -> str:
        """What validation is told: all tags in their order, in the first template."""
        return self._within(self._templates[0], caption)

    def all_of(self, captions: Sequence[str]) -> list[str]:
        """Everything that `of` and `plain` may return for these, where tags are neither shuffled nor left out."""
        return [self._within(template, caption) for caption in captions for template in self._templates]

    def _within(self, template: str, caption: str) -> str:
        trigger = self._data.trigger
        if trigger is not None:
            if TRIGGER in caption:
                caption = caption.replace(TRIGGER, trigger)
            elif trigger not in caption:
                caption = ", ".join(part for part in (trigger, caption) if part)
        return template.replace(CAPTION, caption)


def _tags(caption: str) -> list[str]:
    return [tag for part in caption.split(",") if (tag := part.strip())]
