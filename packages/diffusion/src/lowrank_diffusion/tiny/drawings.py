"""Captioned pictures of coloured shapes, drawn on demand: what the tiny SDXL learns from."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 215, 50),
    "green": (50, 160, 70),
    "blue": (45, 90, 210),
    "purple": (135, 60, 170),
    "pink": (245, 150, 190),
    "brown": (130, 85, 50),
    "black": (25, 25, 25),
    "white": (250, 250, 250),
}
PLACES = {"left": (0.27, 0.5), "right": (0.73, 0.5), "top": (0.5, 0.27), "bottom": (0.5, 0.73)}
_RADIUS = {"small": 0.14, "large": 0.3}
_FINER = 4
"""Drawn so many times larger and then reduced, for smooth edges."""

Point = tuple[float, float]


def _regular(corners: int, turn: float = 0.0, inner: float = 1.0) -> list[Point]:
    """Corners of a regular polygon of radius 1, a star where every second corner lies at `inner`."""
    angles = (2 * math.pi * (number / corners) + turn for number in range(corners))
    return [
        ((inner if number % 2 else 1.0) * math.sin(angle), -(inner if number % 2 else 1.0) * math.cos(angle))
        for number, angle in enumerate(angles)
    ]


def _curve(x: Callable[[float], float], y: Callable[[float], float]) -> list[Point]:
    return [(x(t), y(t)) for t in (2 * math.pi * number / 90 for number in range(90))]


def _moon() -> list[Point]:
    outer = [(math.sin(t), -math.cos(t)) for t in (math.pi * number / 40 for number in range(41))]
    inner = [(0.45 * math.sin(t), -math.cos(t)) for t in (math.pi * number / 40 for number in range(40, -1, -1))]
    return [(x - 0.5, y) for x, y in outer + inner]


SHAPES: dict[str, Sequence[Point]] = {
    "circle": _curve(math.sin, math.cos),
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": _regular(3),
    "diamond": [(0, -1), (0.7, 0), (0, 1), (-0.7, 0)],
    "star": _regular(10, inner=0.42),
    "cross": [
        *[(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)],
        *[(0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)],
    ],
    "heart": _curve(
        lambda t: math.sin(t) ** 3,
        lambda t: -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16,
    ),
    "moon": _moon(),
}


@dataclass(frozen=True)
class Drawing:
    """One or two shapes on a plain background; a shape that nobody places lies anywhere near the middle."""

    shape: str
    colour: str
    background: str
    size: str | None = None
    place: str | None = None
    second: tuple[str, str] | None = None
    """Shape and colour of what lies at the right; the first one then lies at the left."""

    @property
    def caption(self) -> str:
        """`a small red star on a blue background`, and what is not given stays unsaid."""
        named = _with_article(" ".join(filter(None, (self.size, self.colour, self.shape))))
        if self.second:
            named += f" and {_with_article(f'{self.second[1]} {self.second[0]}')}"
        elif self.place:
            named += f" at the {self.place}"
        return f"{named} on {_with_article(self.background)} background"

    def draw(self, width: int, height: int, rng: random.Random) -> Image.Image:
        """An RGB picture of that many pixels; `rng` decides what the caption leaves open."""
        canvas = Image.new("RGB", (width * _FINER, height * _FINER), _shaded(self.background, rng))
        pen, unit = ImageDraw.Draw(canvas), min(width, height) * _FINER
        if self.second:
            self._stamp(pen, canvas, unit, self.shape, self.colour, PLACES["left"], 0.18, rng)
            self._stamp(pen, canvas, unit, *self.second, PLACES["right"], 0.18, rng)
        else:
            centre = PLACES[self.place] if self.place else (rng.uniform(0.42, 0.58), rng.uniform(0.42, 0.58))
            largest = 0.22 if self.place else 0.32
            radius = min(_RADIUS[self.size], largest) if self.size else rng.uniform(0.2, largest)
            self._stamp(pen, canvas, unit, self.shape, self.colour, centre, radius, rng)
        return canvas.resize((width, height), Image.Resampling.BOX)

    @staticmethod
    def _stamp(
        pen: ImageDraw.ImageDraw,
        canvas: Image.Image,
        unit: int,
        shape: str,
        colour: str,
        centre: Point,
        radius: float,
        rng: random.Random,
    ) -> None:
        x, y = centre[0] * canvas.width, centre[1] * canvas.height
        reach = radius * unit * rng.uniform(0.92, 1.08)
        pen.polygon([(x + reach * a, y + reach * b) for a, b in SHAPES[shape]], fill=_shaded(colour, rng))


def _with_article(words: str) -> str:
    return f"{'an' if words.startswith('o') else 'a'} {words}"


def _shaded(colour: str, rng: random.Random) -> tuple[int, int, int]:
    """The named colour, a little lighter or darker."""
    red, green, blue = (max(0, min(255, channel + rng.randint(-12, 12))) for channel in COLOURS[colour])
    return red, green, blue


def random_drawing(rng: random.Random) -> Drawing:
    """Any drawing whose shapes can be told from the background."""
    background, colour, other = rng.sample(list(COLOURS), 3)
    shape = rng.choice(list(SHAPES))
    kind = rng.random()
    if kind < 0.3:
        return Drawing(shape, colour, background, second=(rng.choice(list(SHAPES)), other))
    size = rng.choice([None, "small", "large"])
    place = rng.choice(list(PLACES)) if kind < 0.6 and size != "large" else None
    return Drawing(shape, colour, background, size, place)


def all_words() -> list[str]:
    """Every word a caption may hold."""
    return ["a", "an", "and", "at", "the", "on", "background", "small", "large", *PLACES, *COLOURS, *SHAPES]
