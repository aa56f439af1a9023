"""The adapters that a command line names: which files they are, and what a run says of its base."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lowrank_core.errors import LowrankError, UsageError
from lowrank_core.files.diffusers_file import WEIGHTS_NAME as DIFFUSERS_NAME
from lowrank_core.files.peft import COMPONENT_OF_FOLDER, CONFIG_NAME
from lowrank_core.files.tensors import check_readable
from lowrank_diffusion.config import DiffusionConfig
from lowrank_diffusion.fetching import local_adapter
from lowrank_diffusion.folder import adapter_of
from lowrank_diffusion.hub import HubPlace, hub_place
from lowrank_diffusion.identity import file_digest
from lowrank_diffusion.load import load_config
from lowrank_diffusion.words import word_file


@dataclass(frozen=True)
class Source:
    """An adapter's folder or file.

    run: the configuration of the run that it is of, None where it is none. place: where on the hub it is from.
    """

    path: Path
    run: DiffusionConfig | None = None
    place: HubPlace | None = None

    @property
    def name(self) -> str:
        if self.run is not None:
            return self.run.name
        if self.place is not None:
            return self.place.name
        return self.path.resolve().name if self.path.is_dir() else self.path.stem

    @property
    def embedding(self) -> Path | None:
        """The file of the word that the run trained beside the adapter, if it did."""
        if self.run is None or self.run.pivotal.token is None:
            return None
        return self._home / word_file(self.run.name)

    @property
    def _home(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def files(self) -> list[Path]:
        """The files that the adapter is read from."""
        path = self.path
        if path.is_file():
            beside = path.name == CONFIG_NAME or path.stem == "adapter_model"
            return sorted(path.parent.glob("adapter_*")) if beside else [path]
        if (path / CONFIG_NAME).is_file():
            return sorted(path.glob("adapter_*"))
        parts = [path / name for name in COMPONENT_OF_FOLDER if (path / name / CONFIG_NAME).is_file()]
        return sorted(file for part in parts for file in part.glob("adapter_*")) or [path / DIFFUSERS_NAME]

    def digests(self) -> dict[str, str]:
        """The SHA-256 of each file, by its name below the source."""
        return {file.relative_to(self._home).as_posix(): file_digest(file) for file in self.files()}


def sources_of(places: Sequence[Path], note: Callable[[str], None]) -> list[Source]:
    """The adapters at these places, checked as far as can be before a base is loaded.

    Args:
        places: run folders, PEFT folders, diffengine's step folders, or single files; or on the hub.
        note: told of downloads.

    Raises:
        LowrankError: a path that does not exist, a run that has no adapter yet, a file that is no safetensors; what
            cannot be fetched.
    """
    paths = [local_adapter(place, note) for place in places]
    return [_source(path, hub_place(place)) for path, place in zip(paths, places, strict=True)]


def weights_of(sources: Sequence[Source], weights: Sequence[float]) -> Sequence[float]:
    """How much each source counts; 1 each if nothing is asked for.

    Raises:
        UsageError: not as many weights as sources, or one that is not finite.
    """
    if weights and len(weights) != len(sources):
        raise UsageError(
            f"--weight is given {len(weights)} times for {len(sources)} adapters; give one for each, or none"
        )
    for weight in weights:
        if not math.isfinite(weight):
            raise UsageError(f"--weight must be a finite number, got {weight}")
    return weights or [1.0] * len(sources)


def _source(path: Path, place: HubPlace | None) -> Source:
    if path.is_file():
        if path.name != CONFIG_NAME:
            check_readable(path)
        return Source(path, place=place)
    if not path.is_dir():
        raise LowrankError(f"there is no file or folder {path}; give an adapter, or the folder of a run")
    source = Source(path, place=place)
    # Others write a config.yaml too; with metrics it is a run's, or one of a run that has not come to its first step.
    begun = (path / "metrics.jsonl").is_file() or not any(file.is_file() for file in source.files())
    if not begun or not (path / "config.yaml").is_file():
        return source
    run = load_config(str(path / "config.yaml"))
    adapter = adapter_of(path, run)
    if adapter is None:
        raise LowrankError(
            f"the run in {path} has no adapter yet; wait for its end, or go on with it by "
            f"lowrank diffusion train --resume {path}"
        )
    return Source(adapter, run, place)


@dataclass(frozen=True)
class Base:
    """The model below the adapters, as `load_base` takes it, and what it learned to predict with them.

    prediction: `epsilon` or `v_prediction`; None is the base's own.
    """

    path: str
    vae: str | None = None
    revision: str | None = None
    config: str | None = None
    prediction: str | None = None
    zero_terminal_snr: bool = False


def base_of(sources: Sequence[Source], path: str | None, vae: str | None, config: str | None = None) -> Base:
    """The base that is asked for, or else that of the runs.

    Raises:
        UsageError: none is asked for and no source is a run, or runs differ in base or prediction.
    """
    runs = [source.run for source in sources if source.run is not None]
    predictions = {(run.loss.prediction, run.loss.zero_terminal_snr) for run in runs}
    if len(predictions) > 1:
        raise UsageError("these runs were trained to predict different things (loss.prediction); use them one by one")
    prediction, zero_terminal_snr = next(iter(predictions), (None, False))
    bases = list(dict.fromkeys(run.base for run in runs))
    if path is not None:
        return Base(path, vae, None, config, prediction, zero_terminal_snr)
    if not bases:
        raise UsageError(
            "an adapter's files do not say which model they are for; give it with --base, a diffusers folder or "
            "file of an SDXL or Stable Diffusion 1, or a hub id such as stabilityai/stable-diffusion-xl-base-1.0"
        )
    if len({(each.path, each.revision) for each in bases}) > 1:
        raise UsageError(
            f"these runs have different bases ({', '.join(each.path for each in bases)}); choose one with --base"
        )
    own = bases[0]
    return Base(own.path, vae or own.vae, own.revision, config or own.config, prediction, zero_terminal_snr)
