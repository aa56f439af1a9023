"""`lowrank fl run --engine superlink`: submit a run, show its rounds, bring back what came of it."""

import json
import tempfile
import uuid
from contextlib import ExitStack, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lowrank_core import LowrankError
from lowrank_fl.config import EngineConfig, RunConfig
from lowrank_fl.flower.app.collect import Collector
from lowrank_fl.flower.app.connection import Connection, is_loopback
from lowrank_fl.flower.app.events import Listener
from lowrank_fl.flower.app.settings import Settings, write_settings
from lowrank_fl.flower.app.trial import local_superlink
from lowrank_fl.folder import write_whole
from lowrank_fl.interruption import interruptible
from lowrank_fl.results import Observer, RunSummary

# How long the ServerApp may take to write what the finished rounds came to.
_LAST_SECONDS = 60.0


def submit(config: RunConfig, folder: Path, observer: Observer) -> list[RunSummary]:
    """Carry `config` out on a SuperLink, new or where `folder` left it, and return what the ServerApp reports.

    On this machine the ServerApp writes into `folder`; elsewhere it writes to a folder of its own, and everything
    but the model is written to `folder` too as it is reported.

    Raises:
        LowrankError: the SuperLink cannot be reached, or the run fails there.
        KeyboardInterrupt: Ctrl-C, or somebody stopped the run; the ServerApp has been told to keep what is finished.
    """
    engine, folder = config.engine, folder.resolve()
    here = writes_here(engine)
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
        listener = Listener(observer if here else Collector(config, folder, observer))
        try:
            summaries = _follow(connection, settings, listener)
        except KeyboardInterrupt:
            if here:
                _wait_for_the_serverapp(folder)
            raise
    return summaries if here else [Collector.brought_home(summary, folder) for summary in summaries]


def writes_here(engine: EngineConfig) -> bool:
    """Whether the ServerApp writes to the run's own folder, because it runs on this machine."""
    return engine.local_nodes is not None or (is_loopback(engine.address or "") and engine.server_folder is None)


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
    with connection.log(run) as log:
        try:
            assert log.stdout is not None
            said += [line for line in log.stdout if not listener.hear(line)]
        except KeyboardInterrupt:
            with suppress(LowrankError):  # it has ended by itself meanwhile
                connection.stop(run)
            raise
        finally:
            log.kill()
    if listener.error is not None:
        raise LowrankError(listener.error)
    if listener.summaries is not None and not listener.stopped:
        return listener.summaries
    state = connection.state(run)
    if listener.stopped or "stopped" in state:
        raise KeyboardInterrupt
    last = " ".join(" ".join(said[-5:]).split())
    raise LowrankError(f"the run ended on the SuperLink without a result ({state}): {last}")


def _wait_for_the_serverapp(folder: Path) -> None:
    """It holds the folder's lock until it has written what the finished rounds came to."""
    with suppress(Timeout), FileLock(folder / ".lock", timeout=_LAST_SECONDS):
        pass
