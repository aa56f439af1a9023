"""Several processes on this machine that train one adapter together.

The first process reports by lines of JSON on its standard output, which `launch` passes on to the observer.
"""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from lowrank_core.errors import LowrankError
from lowrank_diffusion.config import DiffusionConfig
from lowrank_diffusion.folder import read_summary
from lowrank_diffusion.results import Observer, RunStart, RunSummary, StepRow

_MARK = "lowrank-event "
_LOG = "processes.log"


def launch(config: DiffusionConfig, folder: Path, observer: Observer) -> RunSummary:
    """Run `train.processes` processes over a folder that holds the configuration, and wait for them.

    Raises:
        LowrankError: there are fewer GPUs than processes, or what the first process raised.
        Interrupted: Ctrl-C, which the processes are told of.
    """
    count = config.train.processes
    on_cpu = config.train.device == "cpu" or not torch.accelerator.is_available()
    if not on_cpu and torch.accelerator.device_count() < count:
        raise LowrankError(
            f"train.processes is {count}, and this machine has {torch.accelerator.device_count()} GPUs; each process "
            "takes one, so lower it, or set train.accumulate instead"
        )
    with (folder / _LOG).open("a", encoding="utf-8") as log:
        port = _free_port()
        processes = [_start(folder, number, count, port, on_cpu, log) for number in range(count)]
        try:
            failure = _listen(processes[0], observer)
        except KeyboardInterrupt:
            # They have sessions of their own, so that they hear it once.
            for process in processes:
                process.send_signal(signal.SIGINT)
            failure = _listen(processes[0], observer)
        finally:
            codes = _end(processes)
    if failure is not None:
        return _fail(failure, folder)
    summary = read_summary(folder)
    if any(codes) or summary is None:
        raise LowrankError(
            f"a process ended with code {next((code for code in codes if code), 0)}; what it said is in {folder / _LOG}"
        )
    return summary


def _start(folder: Path, number: int, count: int, port: int, on_cpu: bool, log: IO[str]) -> "subprocess.Popen[str]":
    environment = {**os.environ, "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count)}
    environment |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if on_cpu:
        threads = max(1, (os.cpu_count() or 1) // count)
        environment = {"OMP_NUM_THREADS": str(threads), **environment, "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        [sys.executable, "-m", "lowrank_diffusion.processes", str(folder)],
        env=environment,
        stdout=subprocess.PIPE if number == 0 else log,
        stderr=log,
        text=True,
        start_new_session=True,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _listen(process: "subprocess.Popen[str]", observer: Observer) -> dict[str, Any] | None:
    """Pass events on until the process ends; what it failed with, if it did."""
    failure = None
    calls: dict[str, Callable[..., None]] = {
        "note": observer.note,
        "stage": observer.stage,
        "run_started": lambda **tree: observer.run_started(RunStart(**tree)),
        "step_ended": lambda **tree: observer.step_ended(StepRow(**tree)),
        "run_ended": lambda **tree: observer.run_ended(RunSummary(**tree)),
    }
    assert process.stdout is not None
    for line in process.stdout:
        if not line.startswith(_MARK):
            continue
        event: dict[str, Any] = json.loads(line.removeprefix(_MARK))
        name = event.pop("event")
        if name == "failed":
            failure = event
        else:
            calls[name](**event)
    process.wait()
    return failure


def _end(processes: "list[subprocess.Popen[str]]") -> list[int]:
    """Wait for the others, which end with the first; where it failed, they may wait for it for ever."""
    for process in processes:
        try:
            process.wait(timeout=30 if processes[0].poll() == 0 else 3)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
    return [process.returncode for process in processes]


def _fail(failure: dict[str, Any], folder: Path) -> RunSummary:
    from lowrank_diffusion.one_run import Interrupted

    summary = read_summary(folder)
    if failure["interrupted"] and summary is not None:
        raise Interrupted(folder, summary)
    raise LowrankError(failure["text"])


class _Events:
    """An observer whose observations another process gets."""

    def note(self, text: str) -> None:
        _tell("note", text=text)

    def stage(self, text: str, done: int, total: int) -> None:
        _tell("stage", text=text, done=done, total=total)

    def run_started(self, start: RunStart) -> None:
        _tell("run_started", **dataclasses.asdict(start))

    def step_ended(self, row: StepRow) -> None:
        _tell("step_ended", **dataclasses.asdict(row))

    def run_ended(self, summary: RunSummary) -> None:
        _tell("run_ended", **dataclasses.asdict(summary))


def _tell(event: str, **values: Any) -> None:
    print(_MARK + json.dumps({"event": event, **values}), flush=True)


def main() -> None:
    """One of the processes."""
    from lowrank_diffusion.one_run import Interrupted
    from lowrank_diffusion.run import resume

    try:
        resume(Path(sys.argv[1]), _Events())
    except LowrankError as error:
        if os.environ["RANK"] == "0":
            _tell("failed", text=str(error), interrupted=isinstance(error, Interrupted))
        sys.exit(error.exit_code)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
