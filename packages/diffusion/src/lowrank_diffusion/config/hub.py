"""Where a run's files go when it ends, or on its way."""

import re
from typing import Annotated

from pydantic import AfterValidator, model_validator

from lowrank_diffusion.config.section import Section

_REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]{0,95})/([A-Za-z0-9][\w.-]{0,95})", re.ASCII)


def repository(name: str) -> str:
    """The name of a repository on the hub, if it is one.

    Raises:
        ValueError: it is none.
    """
    if not _REPOSITORY.fullmatch(name) or "--" in name or ".." in name or name.endswith((".git", ".", "-")):
        raise ValueError(
            f"{name!r} is no repository; give OWNER/NAME, of letters, digits, dots, underscores and hyphens"
        )
    return name


class HubConfig(Section):
    """The Hugging Face hub."""

    push: Annotated[str, AfterValidator(repository)] | None = None
    """OWNER/NAME of the repository that gets the finished run, made if it is not there."""
    private: bool = False
    """If it is made."""
    revision: str | None = None
    """The branch; `main` if not given."""
    checkpoints: bool = False
    """Push each checkpoint too, as soon as it is written, so that another machine can go on."""
    license: str | None = None
    """For the card, as the hub names it (openrail++); the base's own if not given and known."""

    @model_validator(mode="after")
    def _has_a_repository(self) -> "HubConfig":
        if self.push is None and (self.checkpoints or self.private or self.revision):
            raise ValueError("nothing is pushed; name the repository in hub.push, as OWNER/NAME")
        return self
