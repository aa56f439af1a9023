"""Where downloads are kept, and how they are announced."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

from lowrank_core.errors import LowrankError

logger = logging.getLogger("lowrank_fl")


def cache_folder() -> Path:
    """`~/.cache/lowrank`, or what the environment variable LOWRANK_CACHE names."""
    return Path(os.environ.get("LOWRANK_CACHE") or "~/.cache/lowrank").expanduser()


@contextmanager
def download(name: str, url: str, folder: Path) -> Iterator[None]:
    """Say what is downloaded and from where, then let the body do it.

    Raises:
        LowrankError: the body fails as downloads fail: no network, a full disk, a wrong checksum.
    """
    logger.info("Downloading %s from %s into %s", name, url, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    # urllib's own errors are OSErrors; torchvision reports a wrong checksum as a RuntimeError.
    except (OSError, HTTPException, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise LowrankError(
            f"the download of {name} from {url} failed ({reason}); try again with a network, or name a folder "
            f"that holds {name} as parquet or image files: -o data.path=FOLDER"
        ) from error
