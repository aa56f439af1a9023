"""The Hugging Face hub: how a place on it is written, and what to do when it refuses."""

import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote

from lowrank_core.errors import LowrankError, UsageError, shortened
from lowrank_diffusion.config.hub import repository

_SPECIAL = r"refs/convert/\w+|refs/pr/\d+"
# A Path makes one slash of two.
_PLACE = re.compile(rf"hf:/{{1,2}}(?P<repository>[^/@]+/[^/@]+)(?:@(?P<revision>{_SPECIAL}|[^/]+))?(?:/(?P<file>.+))?")


@dataclass(frozen=True)
class HubPlace:
    """A repository, or one file of it."""

    repository: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        """As `hub_place` reads it."""
        revision = self.revision or ""
        at = f"@{revision if re.fullmatch(_SPECIAL, revision) else quote(revision, safe='')}" if revision else ""
        return f"hf://{self.repository}{at}" + (f"/{self.file}" if self.file else "")

    @property
    def name(self) -> str:
        """The file's or the repository's, without its owner."""
        return PurePosixPath(self.file).stem if self.file else self.repository.partition("/")[2]


def hub_place(place: str | Path) -> HubPlace | None:
    """What `hf://OWNER/NAME`, with `@REVISION` and `/FILE` if need be, means; None for a place on this machine.

    As in huggingface_hub, a revision's slash is written %2F, except in refs/pr/NUMBER and refs/convert/WORD.

    Raises:
        UsageError: it begins like one and is none.
    """
    text = str(place)
    if not text.startswith("hf:/"):
        return None
    try:
        if (found := _PLACE.fullmatch(text)) is None:
            shown = re.sub("^hf:/+", "hf://", text)
            raise ValueError(f"{shown} is no place on the hub; write hf://OWNER/NAME, or hf://OWNER/NAME@REVISION/FILE")
        revision = found["revision"] and unquote(found["revision"])
        return HubPlace(repository(found["repository"]), revision, found["file"])
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
