"""A program that ends another one when the process that started this one ends, however that comes about.

`python tether.py SECONDS PROGRAM ARGUMENT...` runs the program until it ends, or until this process's stdin closes.
Then the program and all that it started are ended: asked at first, and after SECONDS by force. The kernel closes a pipe
whose writer is killed, so this needs no goodbye. Only the standard library is imported, to start at once.
"""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

_INTERVAL = 0.1


def main(patience: float, command: Sequence[str]) -> int:
    """The program's exit status."""
    program = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    # Nothing is ever written to stdin: it is ready when it is closed.
    while program.poll() is None and not select.select([0], [], [], _INTERVAL)[0]:
        pass
    deadline = time.monotonic() + patience
    _signal_group(program, signal.SIGTERM)
    while time.monotonic() < deadline and _group_lives(program):
        time.sleep(0.05)
    _signal_group(program, signal.SIGKILL)
    return program.wait()


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
