"""Ctrl-C and SIGTERM, heard between two steps."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from lowrank_core.signals import handled


@contextmanager
def stop_requests() -> Generator[Callable[[], bool]]:
    """Inside the block SIGINT and SIGTERM are noted for whoever asks; a second one interrupts at once."""
    asked = False

    def note(number: int) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    with handled(note):
        yield lambda: asked
