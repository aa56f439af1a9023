"""`lowrank fl run`: the runs of a configuration, from data to files."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from lowrank_core import LowrankError, UsageError
from lowrank_core.run_folder import config_file, locked, prepare, take_back_config
from lowrank_fl.checkpoint import load_checkpoint
from lowrank_fl.config import RunConfig
from lowrank_fl.flower.engines import Engine, make_engine
from lowrank_fl.folder import finished_rounds, read_summary, run_name, write_config
from lowrank_fl.load import expand, load_to_resume
from lowrank_fl.one_run import DataCache, OneRun
from lowrank_fl.reporting.run_page import write_report
from lowrank_fl.results import Observer, RunSummary


class Interrupted(LowrankError):
    """Ctrl-C: every finished round is on disk."""

    exit_code = 130

    def __init__(self, out: Path, summaries: Sequence[RunSummary], rounds: int | None = None) -> None:
        if rounds is None:
            rounds = sum(summary.rounds for summary in summaries)
        super().__init__(f"interrupted after {rounds} finished rounds, which are kept in {out}")
        self.summaries = list(summaries)


def run(config: RunConfig, out: Path | None, observer: Observer) -> list[RunSummary]:
    """Carry out every run of `config`, one after the other, and write their folders and the report.

    A sweep's runs lie in folders of their own below `out`; without a sweep `out` is the run's folder.

    Raises:
        LowrankError: `out` holds something already, data or device are missing, training diverges.
        Interrupted: Ctrl-C; the finished rounds and their model are on disk.
    """
    if config.engine.kind != "superlink":
        check_device(config.device)
    folder = prepare(out, config.name)
    try:
        return _carry_out_anywhere(config, folder, observer)
    except LowrankError:
        take_back_config(folder)
        raise


def resume(folder: Path, observer: Observer, overrides: Sequence[str] = ()) -> list[RunSummary]:
    """Go on with the run or the sweep in `folder` after its last finished round, as if it had never stopped.

    Runs that are finished are left as they are. The final weights have the bits of a run that was not interrupted.
    `overrides` may set `rounds`, `federation.tolerated_failures` and the engine's keys but its threads.

    Raises:
        UsageError: an override of something else, or fewer rounds than are finished.
        LowrankError: the folder is no run's, another process writes to it, its checkpoint is damaged or another
            configuration's; and what `run` raises.
        Interrupted: Ctrl-C.
    """
    config = load_to_resume(config_file(folder), overrides)
    for single, swept in expand(config):
        done = finished_rounds(folder / run_name(swept))
        if done > single.rounds:
            raise UsageError(f"{folder / run_name(swept)} has {done} finished rounds already; set rounds to more")
    if config.engine.kind != "superlink":
        check_device(config.device)
    return _carry_out_anywhere(config, folder, observer)


def _carry_out_anywhere(config: RunConfig, folder: Path, observer: Observer) -> list[RunSummary]:
    if config.engine.kind == "superlink":
        return _submit(config, folder, observer)
    return carry_out(config, folder, observer, lambda: make_engine(config))


def carry_out(config: RunConfig, folder: Path, observer: Observer, engine_of: Callable[[], Engine]) -> list[RunSummary]:
    """Carry out what of `config` is not yet done in `folder`, with the engine that `engine_of` makes."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        # Before anything that takes time: whatever ends the run from here on, it can be resumed.
        write_config(folder, config)
        return _carry_out(config, folder, observer, engine_of)


def _submit(config: RunConfig, folder: Path, observer: Observer) -> list[RunSummary]:
    from lowrank_fl.flower.app.submit import submit, writes_here

    runs = [(single, folder / run_name(swept)) for single, swept in expand(config)]
    finished = [summary for single, path in runs if (summary := _finished(single, path))]
    if len(finished) == len(runs):
        return finished
    with locked(folder):
        write_config(folder, config)
    try:
        # A ServerApp on this machine takes the lock itself.
        with nullcontext() if writes_here(config.engine) else locked(folder):
            return submit(config, folder, observer)
    except KeyboardInterrupt:
        found = [summary for _, path in runs if (summary := read_summary(path))]
        raise Interrupted(folder, found, sum(finished_rounds(path) for _, path in runs)) from None


def _finished(config: RunConfig, path: Path) -> RunSummary | None:
    """The summary of a run that leaves nothing to do."""
    summary = read_summary(path)
    if summary is None or summary.interrupted or summary.rounds != config.rounds:
        return None
    # Of a run on another machine only the numbers are here.
    elsewhere = not (path / "model.safetensors").exists()
    return summary if elsewhere or load_checkpoint(path, config) else None


def _carry_out(
    config: RunConfig, folder: Path, observer: Observer, engine_of: Callable[[], Engine]
) -> list[RunSummary]:
    runs = expand(config)
    data = DataCache()
    engine: Engine | None = None
    summaries: list[RunSummary] = []
    try:
        for index, (single, swept) in enumerate(runs):
            path = folder / run_name(swept)
            finished = _finished(single, path)
            if finished is not None:
                summaries.append(finished)
                continue
            engine = engine or engine_of()
            summary = OneRun(single, path, swept, observer, engine, data).carry_out(index, len(runs))
            if summary is not None:
                summaries.append(summary)
            if summary is None or summary.interrupted:
                if config.sweep and summaries:
                    write_report(folder, summaries)
                raise Interrupted(folder, summaries)
    except BaseException:
        if engine is not None:
            engine.close(at_once=True)
        raise
    if engine is not None:
        engine.close()
    if config.sweep:
        write_report(folder, summaries)
    return summaries


def check_device(name: str) -> None:
    """Raise a LowrankError where `name` is no device of this machine."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise LowrankError(f"device {name!r} cannot be used here ({reason}); try -o device=cpu") from None
