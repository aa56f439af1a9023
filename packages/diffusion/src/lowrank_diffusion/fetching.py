"""From the Hugging Face hub: adapters to use or go on from, and runs to resume."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lowrank_core.errors import LowrankError
from lowrank_core.files.diffusers_file import WEIGHTS_NAME
from lowrank_core.files.peft import COMPONENT_OF_FOLDER
from lowrank_core.files.tensors import write_bytes
from lowrank_core.settings import assignment, put, validated
from lowrank_diffusion.checkpoint import checkpoints
from lowrank_diffusion.config import DiffusionConfig
from lowrank_diffusion.config.watching import TrackConfig
from lowrank_diffusion.folder import begin, read_summary, write_summary
from lowrank_diffusion.hub import HubPlace, asking, hub_place
from lowrank_diffusion.load import load_config
from lowrank_diffusion.published import published
from lowrank_diffusion.weights_and_biases import ID
from lowrank_diffusion.words import word_file

Note = Callable[[str], None]
_ADAPTER = (
    "config.yaml",
    "metrics.jsonl",
    "adapter_*",
    WEIGHTS_NAME,
    word_file("*"),
    *(f"{folder}/adapter_*" for folder in COMPONENT_OF_FOLDER),
)
_RUN = ("config.yaml", "metrics.jsonl", "summary.json", ID, "samples/step-*.png", "checkpoint/step-*.safetensors")


def local_adapter(place: str | Path, note: Note) -> Path:
    """Where an adapter lies on this machine, after a download if it is given as `hf://OWNER/NAME`.

    Raises:
        LowrankError: it cannot be fetched.
        UsageError: `hf:` with something else behind it.
    """
    there = hub_place(place)
    if there is None:
        return Path(place)
    found = _fetched(there, _ADAPTER, f"the adapter {there}", note)
    if (found / "metrics.jsonl").is_file() and (found / "config.yaml").is_file():
        config = load_config(str(found / "config.yaml"))
        if not config.adapter.in_peft:
            file = dataclasses.replace(there, file=f"{config.name}.safetensors")
            return _fetched(file, [], f"the adapter {file}", note).parent
    return found


def fetch_run(there: HubPlace, out: Path | None, overrides: Sequence[str], note: Note) -> Path:
    """A run with its checkpoint, into a folder that can be resumed.

    Args:
        there: whose `file` is None.
        out: a new or empty folder; None is one below runs/.
        overrides: `dotted.key=value`, for what is elsewhere on this machine; what would change the run's numbers is
            found out when it is resumed.
        note: told of the download.

    Raises:
        LowrankError: it cannot be fetched, is no run, or was pushed without its checkpoint.
        UsageError: overrides that are none.
    """
    name = there.repository
    source = _fetched(there, _RUN, f"the run {name}", note)
    if not (source / "config.yaml").is_file():
        raise LowrankError(f"{name} on the Hugging Face hub holds no run: there is no config.yaml in it")
    if not checkpoints(source):
        raise LowrankError(
            f"{name} on the Hugging Face hub holds no checkpoint to go on from; push it again by "
            f"lowrank diffusion push FOLDER {name} --with-checkpoint"
        )
    config = _config(source / "config.yaml", name, overrides)
    folder = begin(out, config)
    # The checkpoint, which counts on the rows before it, comes last.
    for pattern in _RUN[1:]:
        if pattern == ID and not config.track.wandb:
            continue
        for file in sorted(source.glob(pattern)):
            write_bytes(folder / file.relative_to(source), file.read_bytes())
    if (summary := read_summary(folder)) is not None:
        write_summary(folder, dataclasses.replace(summary, run_dir=str(folder)))
    return folder


def _config(file: Path, name: str, overrides: Sequence[str]) -> DiffusionConfig:
    """A configuration from elsewhere: it names no folder outside this one, and pushes only where it came from.

    Of Weights & Biases it says nothing, which `overrides` may.
    """
    tree: dict[str, Any] = published(load_config(str(file)))
    if tree["hub"]["push"] != name:
        tree["hub"] = {}
    tree["track"] |= TrackConfig().model_dump(include={"wandb", "project", "entity"})
    for override in overrides:
        put(tree, *assignment(override, "-o"))
    return validated(DiffusionConfig, tree)[0]


def _fetched(there: HubPlace, patterns: Sequence[str], what: str, note: Note) -> Path:
    """The folder in the hub's cache, or the one file."""
    from huggingface_hub import hf_hub_download, snapshot_download

    note(f"fetching {what} from the Hugging Face hub, unless it is in the hub's cache")
    with asking(f"{what} cannot be fetched from the Hugging Face hub"):
        if there.file is not None:
            return Path(hf_hub_download(there.repository, there.file, revision=there.revision))
        return Path(snapshot_download(there.repository, revision=there.revision, allow_patterns=list(patterns)))
