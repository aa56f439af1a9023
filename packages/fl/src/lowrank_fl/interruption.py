"""Being told to stop: as Python's KeyboardInterrupt, and not amid what belongs together."""

import signal
from collections.abc import Generator
from contextlib import contextmanager

from lowrank_core.signals import SIGNALS, handled


@contextmanager
def interruptible() -> Generator[None]:
    """Inside the block SIGTERM is what Ctrl-C is, and later ones are ignored: ending in order takes time."""

    def interrupt(number: int) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    with handled(interrupt):
        yield


@contextmanager
def uninterrupted() -> Generator[None]:
    """Inside the block SIGINT and SIGTERM wait for its end."""
    waiting: list[int] = []
    try:
        with handled(waiting.append):
            yield
    finally:
        for number in waiting:
            signal.raise_signal(number)
