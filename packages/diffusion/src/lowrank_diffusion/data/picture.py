"""A captioned picture that nobody has opened yet."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lowrank_core.errors import shortened

Note = Callable[[str], None]
"""Is told what a user should know: a download, a file left out."""

Size = tuple[int, int]
"""Height and width in pixels."""

_SHOWN = 5


@dataclass(frozen=True)
class Picture:
    """`open` gives the picture as it is stored: not turned, in any mode, of most formats only the header read."""

    name: str
    """The file or row, for messages."""
    caption: str
    open: Callable[[], Image.Image]
    mask: "Picture | None" = None
    """Beside it: white where it counts in the loss."""


@dataclass(frozen=True)
class PictureFile:
    """Opens a file."""

    path: Path

    def __call__(self) -> Image.Image:
        return Image.open(self.path)


def first_of(names: Sequence[str]) -> str:
    """The first few names, and how many there are besides: `a.png, b.png and 7 more`."""
    more = len(names) - _SHOWN
    return ", ".join(map(shortened, names[:_SHOWN])) + (f" and {more} more" if more > 0 else "")
