"""SIGINT and SIGTERM in other hands for a while."""

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C, and being asked to end."""


@contextmanager
def handled(handle: Callable[[int], None]) -> Generator[None]:
    """Inside the block `handle` is called with each of `SIGNALS`, outside the main thread nothing changes.

    Only the main thread may set handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda given, frame: handle(given)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
