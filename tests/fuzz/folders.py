"""A folder of which one file is damaged."""

import shutil
from contextlib import suppress

from guard import answers_or_refuses
from hypothesis import given
from mutations import fuzzed

from lowrank_core import LowrankError


def fuzz(run, name, contents, *reads):
    """Each of `reads` is given a copy of the folder in which one file is damaged."""

    sound = run.parent / "sound"
    shutil.copytree(run, sound)
    # First outside the guard: what is imported for it may write.
    for read in reads:
        with suppress(LowrankError):
            read(sound)
    shutil.rmtree(sound)

    @fuzzed
    @given(content=contents)
    def one(content):
        copied = run.parent / "case" / "run"
        copied.parent.mkdir()
        try:
            shutil.copytree(run, copied)
            (copied / name).write_bytes(content)
            for read in reads:
                answers_or_refuses(lambda read=read: read(copied), copied)
            assert [path.name for path in copied.parent.iterdir()] == ["run"]
        finally:
            shutil.rmtree(copied.parent)

    one()
