"""The Hugging Face hub: how a place on it is written, and what to do when it refuses."""

import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lowrank_core.errors import LowrankError, UsageError, shortened
from lowrank_diffusion.config.hub import repository

# A Path makes one slash of two.
_PLACE = re.compile(r"hf:/{1,2}(?P<repository>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<file>.+))?")


@dataclass(frozen=True)
class HubPlace:
    """A repository, or one file of it."""

    repository: str
    revision: str | None = None
    file: str | None = None


def hub_place(place: str | Path) -> HubPlace | None:
    """What `hf://OWNER/NAME`, with `@REVISION` and `/FILE` if need be, means; None for a place on this machine.

    Raises:
        UsageError: it begins like one and is none.
    """
    text = str(place)
    if not text.startswith("hf:/"):
        return None
    try:
        if (found := _PLACE.fullmatch(text)) is None:
            raise ValueError(f"{text} is no place on the hub; write hf://OWNER/NAME, or hf://OWNER/NAME@REVISION/FILE")
        return HubPlace(repository(found["repository"]), found["revision"], found["file"])
    except ValueError as error:
        raise UsageError(str(error)) from None


@contextmanager
def asking(what: str) -> Generator[None]:
    """Calls of the hub; `what` says with whom and why, for who reads that it failed.

    Raises:
        LowrankError: any of them fails.
    """
    try:
        yield
    # The hub's errors are many, of several libraries.
    except Exception as error:
        raise LowrankError(f"{what} ({_advice(error)})") from error


def _advice(error: Exception) -> str:
    from httpx import TransportError
    from huggingface_hub import errors

    chain = list(_chain(error))
    if any(isinstance(each, errors.OfflineModeIsEnabled) for each in chain):
        return "HF_HUB_OFFLINE forbids the network; unset it"
    if any(isinstance(each, errors.RevisionNotFoundError) for each in chain):
        return "the repository has no such revision; check it"
    if any(isinstance(each, errors.RepositoryNotFoundError) for each in chain):
        return (
            "there is no such repository, or it is private and your login may not see it; check the name and the login"
        )
    status = next((each.response.status_code for each in chain if isinstance(each, errors.HfHubHTTPError)), None)
    if status == 401:
        return "the hub takes no login of yours; run hf auth login, or set HF_TOKEN"
    if status == 403:
        return (
            "your login has no right to do that; take a token that may write, and an owner that is you or an "
            "organisation of yours"
        )
    if any(isinstance(each, TransportError) for each in chain):
        return f"the hub cannot be reached: {shortened(str(chain[-1]))}; check the network"
    return shortened(str(error).strip()) or type(error).__name__


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it came from."""
    while True:
        yield error
        if (cause := error.__cause__ or error.__context__) is None:
            return
        error = cause
