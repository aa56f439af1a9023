"""Flower's simulation: clients in the Ray actors of its backend, on this machine or on a Ray cluster."""

import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from torch import nn

from lowrank_core import LowrankError
from lowrank_fl.config import RunConfig
from lowrank_fl.data.examples import Examples, Parts
from lowrank_fl.flower.grid import LocalGrid, client_of, make_context
from lowrank_fl.flower.records import ArrayRecord, map_slots
from lowrank_fl.flower.remote import make_remote_app, resident_of
from lowrank_fl.flower.workers import InProcess
from lowrank_fl.training import LocalTraining


class RayEngine:
    """Every actor makes its data and its model from the run's configuration, and becomes any client in turn.

    The backend's actors are fed directly: Flower's own loop around it owns the process and looks for messages ten times
    a second, and its pool takes a dead actor back.
    """

    shared = False

    def __init__(self, config: RunConfig, workers: int) -> None:
        self._timeout = config.engine.timeout
        self._server = InProcess()
        self._clients = 0
        self._backend = _start(config, workers)
        # It would report every client's error beside us.
        self._logger = logging.getLogger("flwr")
        self._level = self._logger.level
        self._logger.setLevel(logging.CRITICAL)
        self._busy: list[Any] = []
        self._closed = False
        # One for each actor, so that there is an idle one for every message.
        self._threads = ThreadPoolExecutor(self._backend.num_workers)

    def set_up(self, config: RunConfig, model: nn.Module, examples: Examples, parts: Parts, how: LocalTraining) -> Grid:
        self._server.set_up(model, examples, parts, how)
        self._clients = config.federation.clients
        assert how.state_folder is not None
        self._backend.app_fn = partial(_client_app, config.model_dump_json(), how.state_folder.resolve())
        map_slots(None)  # shared memory that another engine may have left
        return LocalGrid(self._clients, self._execute, shared=False)

    def evaluate(self, record: ArrayRecord) -> tuple[float, float]:
        return self._server.evaluate(record)

    def close(self, *, at_once: bool = False) -> None:
        """End the actors; a client that is still training, and may never answer, is not waited for."""
        import ray

        self._closed = True
        for actor in list(self._busy):
            ray.kill(actor)
        self._threads.shutdown(cancel_futures=True)
        self._backend.terminate()
        self._server.close()
        self._logger.setLevel(self._level)

    def _execute(self, messages: Sequence[Message]) -> list[Message]:
        """The replies that come in time, in the order of the messages."""
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        futures = [self._threads.submit(self._ask, message, deadline) for message in messages]
        return [reply for future in futures if (reply := future.result()) is not None]

    def _ask(self, message: Message, deadline: float | None) -> Message | None:
        """The reply, or None after the deadline. An actor that is late or dead makes room for a new one."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return None
        client = client_of(message.metadata.dst_node_id)
        context = make_context(client, self._clients)
        idle = self._backend.pool.pool
        actor = idle.pop()
        self._busy.append(actor)
        usable = False
        try:
            _, reply, _ = ray.get(actor.run.remote(self._backend.app_fn, message, str(client), context), timeout=left)
            usable = True
            return reply
        except GetTimeoutError:
            ray.kill(actor)
            return None
        except RayActorError:
            return _error("its Ray actor died, most likely for lack of memory; try -o engine.workers=1", message)
        except RayTaskError as error:
            usable = True
            return _error(f"{type(error.cause).__name__}: {error.cause}", message)
        finally:
            self._busy.remove(actor)
            if not self._closed:
                idle.append(actor if usable else self._backend.pool.create_actor_fn())


def _error(reason: str, message: Message) -> Message:
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def _start(config: RunConfig, workers: int) -> Any:
    """Flower's backend with as many actors as there are workers, or as a running cluster has room for."""
    # Read when ray is imported: neither usage reports nor a warning about what a later Ray does with GPUs.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    threads = config.engine.threads
    on_gpu = torch.device(config.device).type == "cuda"
    init: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if not os.environ.get("RAY_ADDRESS"):
        init["num_cpus"] = workers * threads
    resources = {"num_cpus": threads, "num_gpus": 1 / workers if on_gpu else 0.0}
    path = os.environ.get("PYTHONPATH")
    try:
        from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend

        backend = RayBackend({"init_args": init, "client_resources": resources})
        backend.build(ClientApp)  # set_up says which app
    except (ImportError, ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise LowrankError(f"Ray does not start ({reason}); try -o engine.kind=local") from None
    finally:
        # The backend adds all of sys.path to it.
        os.environ.pop("PYTHONPATH", None)
        if path is not None:
            os.environ["PYTHONPATH"] = path
    return backend


# What follows runs in the actors.


@lru_cache(maxsize=1)
def _client_app(config: str, states: Path) -> ClientApp:
    return make_remote_app(lambda message, context: resident_of(config, states))
