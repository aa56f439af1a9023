"""The errors that a user can mend."""

from collections.abc import Sequence

_LONGEST = 200


class LowrankError(Exception):
    """A situation the user can mend: what was wrong, what was found, what to do next, in one sentence.

    The command line prints the message alone on stderr and exits with `exit_code`;
    every other exception is a fault of ours and keeps its traceback.
    """

    exit_code = 1


class UsageError(LowrankError):
    """The request itself cannot be meant: an unknown name, a value of the wrong type or out of range."""

    exit_code = 2


def shortened(text: str) -> str:
    """What a message quotes, on one line; of a long text its beginning."""
    text = " ".join(text.splitlines())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def quoted(names: Sequence[str]) -> str:
    """Names as a message lists them: `"a", "b"`."""
    return ", ".join(f'"{name}"' for name in names)
