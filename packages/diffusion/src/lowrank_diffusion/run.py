"""`lowrank diffusion train`: a run begun, or gone on with, in a folder of its own."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from lowrank_core.errors import LowrankError, UsageError
from lowrank_core.run_folder import config_file, locked, take_back_config
from lowrank_diffusion.config import DiffusionConfig
from lowrank_diffusion.devices import make_accelerator
from lowrank_diffusion.fetching import fetch_run
from lowrank_diffusion.folder import begin, read_summary
from lowrank_diffusion.hub import HubPlace
from lowrank_diffusion.load import load_config
from lowrank_diffusion.one_run import OneRun
from lowrank_diffusion.results import Observer, RunSummary, Silent


def run(config: DiffusionConfig, out: Path | None, observer: Observer) -> RunSummary:
    """Carry out a run and write its folder, `out` or a new one below runs/.

    Raises:
        LowrankError: `out` holds something already; base, data or device are missing; training diverges.
        Interrupted: Ctrl-C; the finished steps are on disk.
    """
    folder = _prepared_by_one(config, out) if _is_one_of_several() else begin(out, config)
    try:
        return _carry_out(config, folder, observer)
    except LowrankError:
        take_back_config(folder)
        raise


def resume(folder: Path, observer: Observer) -> RunSummary:
    """Go on with the run in `folder` after its latest checkpoint, as if it had never stopped.

    A run that is finished is left as it is. On a CPU the losses and the adapter have the bits of a run that was not
    interrupted.

    Raises:
        LowrankError: the folder is no run's, another process writes to it, its checkpoint is damaged or another
            configuration's; and what `run` raises.
        Interrupted: Ctrl-C.
    """
    return _carry_out(load_config(str(config_file(folder))), folder, observer)


def resume_from_hub(there: HubPlace, out: Path | None, overrides: Sequence[str], observer: Observer) -> RunSummary:
    """Fetch a run that was pushed with its checkpoint into a new folder, and go on with it there.

    Raises:
        LowrankError: what `fetch_run` and `resume` raise.
        UsageError: several processes were started, and each would fetch it.
        Interrupted: Ctrl-C.
    """
    if _is_one_of_several():
        raise UsageError(
            "several processes were started, and each would fetch the run; resume it with one, or with --resume DIR "
            "from a folder that all see"
        )
    return resume(fetch_run(there, out, overrides, observer.note), observer)


def _is_one_of_several() -> bool:
    """Whether this process was started as one of a group, by `launch` or by accelerate's launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _prepared_by_one(config: DiffusionConfig, out: Path | None) -> Path:
    """The folder that the first process of a group makes, for all of them."""
    if out is None:
        raise UsageError("several processes were started, and each would name a folder of its own; give --out")
    accelerator = make_accelerator(config.train)
    if accelerator.is_main_process:
        begin(out, config)
    accelerator.wait_for_everyone()
    return out


def _carry_out(config: DiffusionConfig, folder: Path, observer: Observer) -> RunSummary:
    if config.train.processes > 1 and not _is_one_of_several():
        from lowrank_diffusion.processes import launch

        return launch(config, folder, observer)
    accelerator = make_accelerator(config.train)
    main = accelerator.is_main_process
    with locked(folder) if main else nullcontext():
        finished = read_summary(folder)
        if finished is not None and finished.steps == config.train.steps and not finished.interrupted:
            return finished
        try:
            return OneRun(config, folder, observer if main else Silent(), accelerator).carry_out()
        except torch.OutOfMemoryError as error:
            raise LowrankError(
                f"the device has no memory left ({str(error).splitlines()[0]}); set train.checkpointing: true, "
                "train.precision: bf16, base.quantize: nf4, train.offload: true or a smaller train.batch_size with "
                "a larger train.accumulate"
            ) from error
