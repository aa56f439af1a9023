"""Regular expressions for the names of layers, tried out before they are used.

They may come in a file from anywhere. For some of them, such as `(a+)+`, Python's matching goes through so many ways
that it never ends, and no other thread can stop it. So whatever has more in it than letters is first matched in a
process of its own, which can be ended; what came to an end there does so here.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Literal, TypeVar

from lowrank_core.errors import LowrankError, UsageError, shortened

T = TypeVar("T")
Way = Literal["match", "fullmatch"]

_PLAIN = re.compile(r"[\w.^$\\-]{0,300}")
_LONGEST = 300
"""Of plain patterns and names of at most so many characters every match is quick."""
_SECONDS = 10
_SCRIPT = """
import json, re, sys
expressions, way, names = json.load(sys.stdin)
for expression in expressions:
    match = getattr(re.compile(expression), way)
    for name in names:
        match(name)
    print(flush=True)
"""


def compiled(
    field: str, expressions: Mapping[str, str], names: Sequence[str], way: Way = "match"
) -> dict[str, re.Pattern[str]]:
    """The regular expressions of a field of a configuration.

    Args:
        field: as the user knows it.
        expressions: by the pattern that is written there.
        names: that they will be matched with.
        way: of matching.

    Raises:
        UsageError: one is no regular expression, or has not been matched with all names after ten seconds.
    """
    patterns: dict[str, re.Pattern[str]] = {}
    for text, expression in expressions.items():
        try:
            patterns[text] = re.compile(expression)
        except (re.error, OverflowError, RecursionError) as error:
            found = shortened(repr(text))
            raise UsageError(f"{field} {found} is not a regular expression: {error}; mend it") from None
    short = all(len(name) <= _LONGEST for name in names)
    doubtful = [text for text in expressions if not (short and _PLAIN.fullmatch(text))]
    if doubtful:
        done = _tried_out(tuple(expressions[text] for text in doubtful), way, tuple(names))
        if done < len(doubtful):
            raise UsageError(
                f"{field} {shortened(repr(doubtful[done]))} takes longer than {_SECONDS} seconds to match the layers' "
                "names; write it without a repetition inside another, or list the names"
            )
    return patterns


@lru_cache(maxsize=64)
def _tried_out(expressions: tuple[str, ...], way: Way, names: tuple[str, ...]) -> int:
    """How many of the expressions, in their order, have been matched with all names in time."""
    command = [sys.executable, "-I", "-S", "-c", _SCRIPT]
    asked = json.dumps([expressions, way, names]).encode()
    try:
        told = subprocess.run(command, input=asked, capture_output=True, timeout=_SECONDS, check=True).stdout
    except subprocess.TimeoutExpired as late:
        told = late.stdout or b""
    except (OSError, subprocess.CalledProcessError) as error:
        raise LowrankError(f"a pattern cannot be tried out in a process of its own ({error}); list the names") from None
    return len(told.split(b"\n")) - 1


def by_ending(names: Sequence[str], patterns: Mapping[str, T], field: str) -> tuple[dict[str, T], list[str]]:
    """The values of names that end in a match of a key, as PEFT 0.21 has it (`get_pattern_key`); the first key counts.

    Returns:
        The values by name, and the keys that match no name.

    Raises:
        UsageError: as `compiled`.
    """
    values: dict[str, T] = {}
    unmatched: list[str] = []
    for key, expression in compiled(field, {key: rf"(.*\.)?({key})$" for key in patterns}, names).items():
        found = [name for name in names if expression.match(name)]
        if not found:
            unmatched.append(key)
        values = dict.fromkeys(found, patterns[key]) | values
    return values, unmatched
