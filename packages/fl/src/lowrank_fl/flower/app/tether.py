"""A program that ends another one when the process that started this one ends, however that comes about.

`python tether.py SECONDS PROGRAM ARGUMENT...` runs the program until it ends, or until this process's stdin closes.
Then the program and all that it started are ended: asked at first, and after SECONDS by force. The kernel closes a pipe
whose writer is killed, so this needs no goodbye. Little is imported, to start at once.
"""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

import psutil

_INTERVAL = 0.1


def main(patience: float, command: Sequence[str]) -> int:
    """The program's exit status."""
    program = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    # Nothing is ever written to stdin: it is ready when it is closed.
    while program.poll() is None and not select.select([0], [], [], _INTERVAL)[0]:
        pass
    # A SuperLink gives what it starts a session of its own, which the group's signals do not reach.
    started = _descendants(program.pid)
    deadline = time.monotonic() + patience
    _signal_group(program, signal.SIGTERM)
    for process in started:
        _signal(process, signal.SIGTERM)
    while time.monotonic() < deadline and (_group_lives(program) or any(map(_lives, started))):
        time.sleep(0.05)
    started += [below for process in started for below in _descendants(process.pid)]
    _signal_group(program, signal.SIGKILL)
    for process in started:
        _signal(process, signal.SIGKILL)
    while any(map(_lives, started)):
        time.sleep(0.01)
    return program.wait()


def _descendants(process: int) -> list[psutil.Process]:
    """What that process has started, however far down, as long as what is between still lives."""
    try:
        return psutil.Process(process).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal(process: psutil.Process, number: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _signal_group(program: "subprocess.Popen[bytes]", number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(program.pid, number)


def _group_lives(program: "subprocess.Popen[bytes]") -> bool:
    program.poll()
    try:
        os.killpg(program.pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
