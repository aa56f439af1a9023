"""What the page's buttons do: the values of its fields to pictures."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import count
from pathlib import Path

from lowrank_core.errors import LowrankError, UsageError
from lowrank_diffusion.infer.request import Request, check, size_of
from lowrank_diffusion.infer.studio import Studio, Told


@dataclass(frozen=True)
class Fields:
    """What stands in the page's fields, in their order; None is a field that is empty."""

    prompt: str | None
    negative: str | None
    weights: Sequence[float | None]
    steps: int | None
    guidance: float | None
    scheduler: str | None
    """None is the base's own."""
    images: int | None
    width: int | None
    height: int | None
    seed: int | None

    def request(self, start: Request) -> Request:
        """`start` with these values in it.

        Raises:
            UsageError: a field is empty that must not be, or a value that cannot be meant.
        """
        may_be_empty = ("prompt", "negative", "scheduler")
        empty = [each.name for each in fields(self) if getattr(self, each.name) is None]
        empty = [name for name in empty if name not in may_be_empty] + ["weight"] * (None in self.weights)
        if empty:
            raise UsageError(f"the field {empty[0]} is empty; put a number there")
        request = replace(
            start,
            prompts=[self.prompt or ""],
            negative=self.negative or None,
            weights=self.weights,
            steps=self.steps,
            guidance=self.guidance,
            scheduler=self.scheduler,
            images=self.images,
            size=f"{self.width}x{self.height}",
            seed=self.seed,
        )
        check(request)
        return request


@dataclass(frozen=True)
class Drawing:
    """What came of the button.

    seconds: from its start to the last picture's file.
    wanted: how many pictures were asked for, more than there are if the drawing was stopped.
    """

    images: Sequence[Path]
    wanted: int
    seconds: float
    out: Path


class Desk:
    """A studio for a page that asks for one drawing at a time; each has a numbered folder of its own in `out`.

    Args:
        studio: draws.
        start: the command line's request; what is no field of the page stays as it says.
        out: as `free_folder` gives it.
        note: told what the studio does.
    """

    def __init__(self, studio: Studio, start: Request, out: Path, note: Callable[[str], None]) -> None:
        self.studio, self.start, self.out, self._note = studio, start, out, note
        self.size = studio.usual_size if start.size is None else size_of(start.size)
        self._stopped, self._closed = threading.Event(), threading.Event()

    def draw(self, values: Fields, progress: Callable[[float], None] = lambda share: None) -> Drawing:
        """Draw what the command line would with the same values.

        Args:
            values: of the fields.
            progress: told which share of the drawing is done.

        Raises:
            LowrankError: what drawing raises; `values` that cannot be meant; the desk is closed.
        """
        request = values.request(self.start)
        self._stopped.clear()
        begin = time.perf_counter()

        def go_on(share: float) -> bool:
            progress(share)
            return not (self._stopped.is_set() or self._closed.is_set())

        if self._closed.is_set():
            raise LowrankError("the server is ending, so nothing more is drawn; start it again")
        # A drawing that failed has left no folder.
        out = next(path for path in (self.out / f"{n:03}" for n in count(1)) if not path.exists())
        drawn = self.studio.draw(request, out, Told(self._note, go_on=go_on))
        return Drawing(drawn.images, request.images, time.perf_counter() - begin, out)

    def stop(self) -> None:
        """End the drawing that is under way after its step; its finished pictures remain."""
        self._stopped.set()

    def close(self) -> None:
        """Stop, and draw no more."""
        self._closed.set()
