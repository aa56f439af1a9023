"""What a submitted run carries besides its messages: Flower's run configuration."""

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import ValidationError

from lowrank_core import LowrankError
from lowrank_fl.config import RunConfig
from lowrank_fl.config.run import check_path_name


@dataclass(frozen=True)
class Settings:
    """The values of one submission."""

    config: RunConfig
    folder: str
    """Where the ServerApp writes the run; "" leaves it to `engine.server_folder`."""
    states: str
    """Where clients keep what they know from earlier rounds; "" leaves it to each node, and a node may insist."""
    run: str
    """A name that no other run has, and that stays when a run is resumed."""


def write_settings(settings: Settings) -> dict[str, str]:
    """The settings as Flower carries them."""
    return {
        "config": settings.config.model_dump_json(),
        "folder": settings.folder,
        "states": settings.states,
        "run": settings.run,
    }


def read_settings(run_config: Mapping[str, object]) -> Settings:
    """The settings that Flower carried.

    Raises:
        LowrankError: the run was submitted by another version, or not by `lowrank fl run`, or its name would lead out
            of the folders that are meant for it.
    """
    texts = {key: str(run_config.get(key, "")) for key in ("config", "folder", "states", "run")}
    try:
        config = RunConfig.model_validate_json(texts.pop("config"))
    except ValidationError as error:
        faults = ", ".join(".".join(map(str, fault["loc"])) or fault["msg"] for fault in error.errors())
        raise LowrankError(
            f"this machine cannot read the run's configuration ({faults}); "
            "submit it with lowrank fl run, and install the same version of lowrank everywhere"
        ) from None
    try:
        check_path_name(texts["run"])
    except ValueError as error:
        raise LowrankError(f"the run's name on this machine {error}; submit it with lowrank fl run") from None
    return Settings(config, **texts)
