"""`lowrank fl run --engine superlink`: submit a run, show its rounds, bring back what came of it."""

import json
import subprocess
import tempfile
import uuid
from contextlib import ExitStack
from pathlib import Path

from lowrank_core import LowrankError
from lowrank_fl.config import RunConfig
from lowrank_fl.flower.app.collect import Collector
from lowrank_fl.flower.app.connection import Connection, is_loopback
from lowrank_fl.flower.app.events import Listener
from lowrank_fl.flower.app.interruption import interruptible
from lowrank_fl.flower.app.settings import Settings, write_settings
from lowrank_fl.flower.app.trial import local_superlink
from lowrank_fl.folder import write_whole
from lowrank_fl.results import Observer, RunSummary


class Stopped(Exception):
    """Ctrl-C, and the run has been stopped on the SuperLink."""

    def __init__(self, summaries: list[RunSummary]) -> None:
        super().__init__("stopped")
        self.summaries = summaries


def submit(config: RunConfig, folder: Path, observer: Observer) -> list[RunSummary]:
    """Carry `config` out on a SuperLink, new or where `folder` left it, and return what the ServerApp reports.

    On this machine the ServerApp writes into `folder`; elsewhere it writes to a folder of its own, and everything
    but the model is written to `folder` too as it is reported.

    Raises:
        LowrankError: the SuperLink cannot be reached, or the run fails there.
        Stopped: Ctrl-C.
    """
    engine, folder = config.engine, folder.resolve()
    here = engine.local_nodes is not None or (is_loopback(engine.address or "") and engine.server_folder is None)
    settings = Settings(
        config,
        folder=str(folder) if here else "",
        states=str(folder) if engine.local_nodes is not None else "",
        run=_run_of(folder, config.name),
    )
    with ExitStack() as stack:
        stack.enter_context(interruptible())
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lowrank-flower-")))
        if engine.address is None:
            connection = stack.enter_context(local_superlink(engine, home))
        else:
            connection = Connection(engine.address, engine, home)
        summaries = _follow(connection, settings, Listener(observer if here else Collector(config, folder, observer)))
    return summaries if here else [Collector.brought_home(summary, folder) for summary in summaries]


def _run_of(folder: Path, name: str) -> str:
    """The name under which the run in `folder` is known on other machines, made when it first starts."""
    file = folder / "superlink.json"
    if not file.exists():
        write_whole(file, json.dumps({"run": f"{name}-{uuid.uuid4().hex[:12]}"}).encode())
    return json.loads(file.read_text(encoding="utf-8"))["run"]


def _follow(connection: Connection, settings: Settings, listener: Listener) -> list[RunSummary]:
    """Start the run and pass on what it tells until it ends."""
    run = connection.submit(write_settings(settings))
    said: list[str] = []
    interrupted = False
    with connection.log(run) as log:
        try:
            _listen(log, listener, said)
        except KeyboardInterrupt:
            interrupted = True
            connection.stop(run)
            # What the finished rounds came to, which the ServerApp tells last.
            _listen(log, listener, said)
        finally:
            log.kill()
    if interrupted or listener.stopped:
        raise Stopped(listener.summaries or [])
    if listener.error is not None:
        raise LowrankError(listener.error)
    if listener.summaries is None:
        last = " ".join(" ".join(said[-5:]).split())
        raise LowrankError(f"the run ended on the SuperLink without a result ({connection.state(run)}): {last}")
    return listener.summaries


def _listen(log: "subprocess.Popen[str]", listener: Listener, said: list[str]) -> None:
    assert log.stdout is not None
    for line in log.stdout:
        if not listener.hear(line):
            said.append(line)
