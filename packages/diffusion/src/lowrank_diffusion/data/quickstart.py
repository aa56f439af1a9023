"""A house, drawn in many places: a subject that the tiny SDXL has not met, to train an adapter on at once."""

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from lowrank_diffusion.data.picture import Picture
from lowrank_diffusion.tiny.drawings import COLOURS, PLACES

_WALL, _ROOF = COLOURS["yellow"], COLOURS["red"]
_BACKGROUNDS = ("blue", "green", "white", "purple", "black", "pink", "brown")
_SHAPES = ((1.0, 1.0), (0.75, 1.25), (1.25, 0.75))
"""Height and width, in sides of the square."""
_FINER = 4
"""Drawn so many times larger and then reduced, for smooth edges."""


@dataclass(frozen=True)
class House:
    """A yellow wall under a red roof, always alike but for its place and size."""

    number: int
    height: int
    width: int
    background: str
    place: str | None

    @property
    def caption(self) -> str:
        """`a house at the left on a blue background`."""
        where = f" at the {self.place}" if self.place else ""
        return f"a house{where} on a {self.background} background"

    def __call__(self) -> Image.Image:
        rng = random.Random(self.number)
        shade = rng.randint(-12, 12)
        red, green, blue = (max(0, min(255, channel + shade)) for channel in COLOURS[self.background])
        canvas = Image.new("RGB", (self.width * _FINER, self.height * _FINER), (red, green, blue))
        x, y = PLACES[self.place] if self.place else (rng.uniform(0.45, 0.55), rng.uniform(0.45, 0.55))
        half = min(canvas.size) * (rng.uniform(0.2, 0.23) if self.place else rng.uniform(0.26, 0.36))
        x, y = x * canvas.width, y * canvas.height
        pen = ImageDraw.Draw(canvas)
        pen.rectangle((x - 0.8 * half, y - 0.1 * half, x + 0.8 * half, y + half), fill=_WALL)
        pen.polygon([(x - 1.1 * half, y - 0.1 * half), (x, y - half), (x + 1.1 * half, y - 0.1 * half)], fill=_ROOF)
        return canvas.resize((self.width, self.height), Image.Resampling.BOX)


def quickstart_pictures(resolution: int) -> list[Picture]:
    """24 houses of about `resolution` pixels squared: every place in every shape, before different backgrounds."""
    places = (None, None, None, None, *PLACES)
    pictures: list[Picture] = []
    for number in range(len(places) * len(_SHAPES)):
        height, width = (round(side * resolution) for side in _SHAPES[number // len(places)])
        # Seven backgrounds and eight places, so that a place changes its background with the shape.
        background = _BACKGROUNDS[number % len(_BACKGROUNDS)]
        house = House(number, height, width, background, places[number % len(places)])
        pictures.append(Picture(f"house {number}", house.caption, house))
    return pictures
