"""What a reader may do with a file that nobody vouches for: answer, or say in a sentence what is wrong with it."""

import os
import resource
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowrank_core import LowrankError

_MEMORY = 1 << 30
"""Bytes that a reader may take for files of a few kilobytes."""
_SECONDS = 60
"""After which a reader hangs. No reader comes near it, on a machine however slow."""
_LONGEST = 4_000
"""Characters of an error."""

_WRITES = {"os.mkdir": 0, "os.rename": 1, "os.symlink": 1, "os.link": 1, "os.truncate": 0, "shutil.rmtree": 0}
"""By event, which of its arguments is the path."""
_written: list[str] | None = None


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if _written is None:
        return
    # An open file that is opened again is known by its number alone, and was a path before.
    if event == "open" and not isinstance(arguments[0], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        _written.append(str(arguments[0]))
    elif event in ("os.remove", "os.rmdir") and arguments[1] == -1:  # rmtree removes by names within an open folder
        _written.append(str(arguments[0]))
    elif event in _WRITES:
        _written.append(str(arguments[_WRITES[event]]))


sys.addaudithook(_listen)  # which nothing takes off again


def answers_or_refuses(read: Callable[[], Any], folder: Path) -> Any:
    """What `read` returns, None where it raises a LowrankError; everything else that it does is a failure.

    A write outside `folder`, more than `_MEMORY` or `_SECONDS`, any other exception, and an error of many lines.
    """
    with _bounded(), _only_inside(folder):
        try:
            return read()
        except LowrankError as error:
            message = str(error)
    assert message, "an error without a text"
    assert len(message) < _LONGEST, f"an error of {len(message)} characters: {message[:300]}"
    assert "\n" not in message, message
    return None


@contextmanager
def _only_inside(folder: Path) -> Generator[None]:
    global _written
    _written = []
    try:
        yield
    finally:
        paths, _written = _written, None
    inside = folder.resolve()
    # Python writes what it has compiled of modules that a reader imports.
    outside = [path for path in paths if ".pyc" not in path and not Path(path).resolve().is_relative_to(inside)]
    assert outside in ([], ["/dev/null"] * len(outside)), f"written outside {folder}: {outside}"


@contextmanager
def _bounded() -> Generator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"no answer after {_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    signal.alarm(_SECONDS)
    statm = Path("/proc/self/statm")
    if statm.exists():
        held = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + _MEMORY, limits[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)
