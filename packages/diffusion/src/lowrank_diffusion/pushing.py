"""A run's folder to the Hugging Face hub, without what is this machine's own."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from lowrank_core.errors import LowrankError
from lowrank_core.files.peft import COMPONENT_OF_FOLDER
from lowrank_diffusion.checkpoint import checkpoints
from lowrank_diffusion.config import HubConfig
from lowrank_diffusion.folder import adapter_of, read_summary
from lowrank_diffusion.hub import HubPlace, asking
from lowrank_diffusion.load import load_config
from lowrank_diffusion.published import published
from lowrank_diffusion.weights_and_biases import ID

_ADAPTERS = tuple(f"{folder}/adapter_*" for folder in COMPONENT_OF_FOLDER)
_FILES = ("metrics.jsonl", "*.safetensors", "samples/step-*.png", *_ADAPTERS)


@dataclass(frozen=True)
class Pushed:
    """What came of it.

    url: of the commit. files: their names in the repository.
    """

    repository: str
    url: str
    files: list[str]


def check_repository(hub: HubConfig) -> None:
    """Make the repository, or find that it is there and may be written to; nothing where `hub.push` names none.

    Raises:
        LowrankError: nobody is logged in, or may not write there; there is no network, or it is forbidden.
    """
    if hub.push is None:
        return
    import huggingface_hub

    target = f"{hub.push} cannot be pushed to on the Hugging Face hub"
    if huggingface_hub.get_token() is None:
        raise LowrankError(f"{target} (nobody is logged in; run hf auth login, or set HF_TOKEN)")
    api = huggingface_hub.HfApi(library_name="lowrank")
    with asking(target):
        api.create_repo(hub.push, private=hub.private or None, exist_ok=True)
        if hub.revision is not None:
            api.create_branch(hub.push, branch=hub.revision, exist_ok=True)


def push(run: Path, hub: HubConfig, note: Callable[[str], None]) -> Pushed:
    """Push what a run has, in one commit: card, adapters, samples, metrics, configuration.

    With `hub.checkpoints` the latest checkpoint too, in the place of an earlier one, which is all that
    `--resume hf://OWNER/NAME` needs. The configuration goes as `published` has it.

    Raises:
        LowrankError: the folder is no run's, or has nothing to push yet; and as `check_repository`.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    assert hub.push is not None
    contents = _contents(run, hub.push, with_checkpoint=hub.checkpoints)
    made = "" if hub.private else "; if it is made, it is public (--private or hub.private keeps it yours)"
    place = HubPlace(hub.push, hub.revision)
    note(f"pushing {len(contents)} files of {run} to {place} on the Hugging Face hub{made}")
    check_repository(hub)
    api = HfApi(library_name="lowrank")
    with asking(f"{run} cannot be pushed to {hub.push} on the Hugging Face hub"):
        there = api.list_repo_files(hub.push, revision=hub.revision) if hub.checkpoints else []
        old = [name for name in there if name.startswith("checkpoint/") and name not in contents]
        operations = [
            *(CommitOperationAdd(name, content) for name, content in contents.items()),
            *(CommitOperationDelete(name) for name in old),
        ]
        message = "A run of lowrank"
        commit = api.create_commit(hub.push, operations, commit_message=message, revision=hub.revision)
    return Pushed(hub.push, commit.commit_url, list(contents))


def _contents(run: Path, repository: str, *, with_checkpoint: bool) -> dict[str, Path | bytes]:
    """The files by their names in the repository; as bytes where they say something else than here."""
    if not (run / "config.yaml").is_file():
        raise LowrankError(f"{run} holds no run to push: there is no config.yaml in it; give the folder of a run")
    config = load_config(str(run / "config.yaml"))
    saved = checkpoints(run)[-1:] if with_checkpoint else []
    if not saved and adapter_of(run, config) is None:
        raise LowrankError(
            f"the run in {run} has no adapter yet; go on with it by lowrank diffusion train --resume {run}"
        )
    tree = published(config)
    contents: dict[str, Path | bytes] = {
        "config.yaml": yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode()
    }
    if (card := run / "README.md").is_file():
        # In the folder, `.` is right.
        text = card.read_text(encoding="utf-8").replace('load_lora_weights(".",', f'load_lora_weights("{repository}",')
        contents["README.md"] = text.encode()
    if (summary := read_summary(run)) is not None:
        described = dataclasses.asdict(summary) | {"run_dir": run.resolve().name}
        contents["summary.json"] = (json.dumps(described, indent=2) + "\n").encode()
    files = [file for pattern in _FILES for file in sorted(run.glob(pattern))] + saved
    if saved and (run / ID).is_file():
        files.append(run / ID)
    return contents | {file.relative_to(run).as_posix(): file for file in files}
