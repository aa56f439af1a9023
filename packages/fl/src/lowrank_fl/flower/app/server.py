"""The ServerApp: the same rounds as everywhere, over the nodes of a SuperLink."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from torch import nn

from lowrank_core import LowrankError
from lowrank_fl.config import RunConfig
from lowrank_fl.data.cache import cache_folder
from lowrank_fl.data.examples import Examples, Parts
from lowrank_fl.flower.app.events import Teller
from lowrank_fl.flower.app.settings import Settings, read_settings
from lowrank_fl.flower.engines.hosted import HostedGrid
from lowrank_fl.flower.records import ArrayRecord
from lowrank_fl.flower.workers import InProcess
from lowrank_fl.interruption import interruptible
from lowrank_fl.load import expand
from lowrank_fl.training import LocalTraining

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    from lowrank_fl.run import Interrupted, carry_out, check_device

    teller = Teller()
    try:
        settings = read_settings(context.run_config)
        config = settings.config
        check_device(config.device)
        # Flower stops a run by signals that would end the process at once.
        with interruptible():
            summaries = carry_out(config, _folder(settings), teller, lambda: NodesEngine(config, grid))
    except Interrupted as stop:
        teller.stopped(stop.summaries)
        raise
    except LowrankError as error:
        teller.failed(error)
        raise
    teller.done(summaries)


def _folder(settings: Settings) -> Path:
    if settings.folder:
        return Path(settings.folder)
    return Path(settings.config.engine.server_folder or cache_folder() / "runs").expanduser() / settings.run


class NodesEngine:
    """Clients on SuperNodes; the server's evaluation here."""

    shared = False

    def __init__(self, config: RunConfig, grid: Grid) -> None:
        self._runs = [single for single, _ in expand(config)]
        self._grid = grid
        self._server = InProcess()

    def set_up(self, config: RunConfig, model: nn.Module, examples: Examples, parts: Parts, how: LocalTraining) -> Grid:
        self._server.set_up(model, examples, parts, how)
        # A sweep's clients must know which of its runs a message belongs to.
        extra = {"run": self._runs.index(config)} if len(self._runs) > 1 else {}
        engine = config.engine
        return HostedGrid(
            self._grid, config.federation.clients, timeout=engine.timeout, patience=engine.wait_for_nodes, extra=extra
        )

    def evaluate(self, record: ArrayRecord) -> tuple[float, float]:
        return self._server.evaluate(record)

    def close(self, *, at_once: bool = False) -> None:
        self._server.close(at_once=at_once)
