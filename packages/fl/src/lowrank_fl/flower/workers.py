"""Who runs the clients of the local engine: this process, or worker processes side by side."""

import multiprocessing
import os
import pickle
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from flwr.app import Message
from torch import nn

from lowrank_core import LowrankError
from lowrank_fl.data.examples import Examples, Parts
from lowrank_fl.execution.groups import grouped
from lowrank_fl.flower.records import DOWNLINK_SLOT, ArrayRecord, lay_out, map_slots
from lowrank_fl.flower.resident import Resident
from lowrank_fl.state import state_of, transferred
from lowrank_fl.training import EVALUATION_BATCH, LocalTraining

T = TypeVar("T")

_SHARED_MEMORY = Path("/dev/shm")


class Executor(Protocol):
    """Runs messages on clients, and evaluates models; the same bits whichever executor does it."""

    shared: bool
    """Whether array records must lie in shared memory."""

    def set_up(self, model: nn.Module, examples: Examples, parts: Parts, how: LocalTraining) -> None:
        """Make this federation the one whose clients are run from now on."""
        ...

    def execute(self, messages: Sequence[Message]) -> list[Message]:
        """The replies, in the order of the messages."""
        ...

    def evaluate(self, record: ArrayRecord) -> tuple[float, float]:
        """Accuracy (0 to 1) and mean loss of a model on the server's test set."""
        ...

    def close(self, *, at_once: bool = False) -> None:
        """Let go of models and processes; `at_once` does not wait for clients that are still training."""
        ...


class InProcess:
    """One client after the other, in this process."""

    shared = False

    def __init__(self) -> None:
        self._resident: Resident | None = None

    def set_up(self, model: nn.Module, examples: Examples, parts: Parts, how: LocalTraining) -> None:
        self._resident = Resident(model, examples, parts, how)

    def execute(self, messages: Sequence[Message]) -> list[Message]:
        with self._threads() as resident:
            groups = grouped(messages, resident.trainer.how.group_size)
            return [reply for group in groups for reply in resident.run_group(group, [None] * len(group))]

    def evaluate(self, record: ArrayRecord) -> tuple[float, float]:
        with self._threads() as resident:
            slices = range(0, len(resident.trainer.examples.test_labels), EVALUATION_BATCH)
            return _mean([resident.evaluate(record, start) for start in slices], resident.trainer.examples)

    def close(self, *, at_once: bool = False) -> None:
        self._resident = None

    @contextmanager
    def _threads(self) -> Iterator["Resident"]:
        assert self._resident is not None, "set_up comes first"
        before = torch.get_num_threads()
        torch.set_num_threads(self._resident.trainer.how.threads)
        try:
            yield self._resident
        finally:
            torch.set_num_threads(before)


class Workers:
    """Clients side by side in processes of their own, each with a resident model over shared data.

    The processes start at once and load their libraries while the caller loads its data.
    """

    shared = True

    def __init__(self, count: int) -> None:
        # Never forked from here, because a fork of a process that has run torch's threads may hang: from a server that
        # has only loaded the libraries, once for all workers, where there is such a thing.
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context = multiprocessing.get_context(method)
        context.set_forkserver_preload([__name__])
        self._pools = [ProcessPoolExecutor(1, context, initializer=_start) for _ in range(count)]
        self._pids = [pool.submit(os.getpid) for pool in self._pools]
        self._examples: Examples | None = None
        self._group_size = 1

    def set_up(self, model: nn.Module, examples: Examples, parts: Parts, how: LocalTraining) -> None:
        self._check_shared_memory(model, examples, how)
        self._examples, self._group_size = examples, how.group_size
        messages = 1 + how.federation.clients_per_round
        _, size = lay_out(transferred(model, how.personalization))
        slots = torch.empty(messages, size, dtype=torch.uint8).share_memory_()
        map_slots(slots)
        # The model goes by value, so that no worker trains in another's memory; the rest goes by reference.
        job = (pickle.dumps(model), examples, parts, how, slots)
        for done in [pool.submit(_set_up, *job) for pool in self._pools]:
            done.result()

    def execute(self, messages: Sequence[Message]) -> list[Message]:
        slots = range(DOWNLINK_SLOT + 1, DOWNLINK_SLOT + 1 + len(messages))
        groups = zip(grouped(messages, self._group_size), grouped(slots, self._group_size), strict=True)
        return [reply for replies in self._spread(_run, list(groups)) for reply in replies]

    def evaluate(self, record: ArrayRecord) -> tuple[float, float]:
        assert self._examples is not None, "set_up comes first"
        slices = range(0, len(self._examples.test_labels), EVALUATION_BATCH)
        return _mean(self._spread(_evaluate, [(record, start) for start in slices]), self._examples)

    def close(self, *, at_once: bool = False) -> None:
        if at_once:
            for pid in self._pids:
                if not pid.cancel() and pid.exception() is None:
                    os.kill(pid.result(), signal.SIGTERM)
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)

    def _check_shared_memory(self, model: nn.Module, examples: Examples, how: LocalTraining) -> None:
        """Writing past the end of /dev/shm kills a process without a word, and containers often have 64 MB of it."""
        if not _SHARED_MEMORY.exists():
            return
        held = (examples.inputs, examples.labels, examples.test_inputs, examples.test_labels)
        needed = sum(tensor.nbytes for tensor in held if not tensor.is_shared())
        # Beside updates a client may be sent the weights that they are of.
        state = transferred(model, how.personalization) if how.update.kind == "none" else state_of(model)
        sent = state.values()
        needed += (how.federation.clients_per_round + 3) * sum(tensor.nbytes for tensor in sent)
        free = shutil.disk_usage(_SHARED_MEMORY).free
        if needed > free:
            raise LowrankError(
                f"worker processes would share {needed / 1e6:,.0f} MB in {_SHARED_MEMORY}, "
                f"which has {free / 1e6:,.0f} MB free; run without them (-o engine.workers=1), "
                "or enlarge it (docker run --shm-size=2g)"
            )

    def _spread(self, function: Callable[..., T], jobs: Sequence[tuple[Any, ...]]) -> list[T]:
        """Results in the order of the jobs. A worker gets its next jobs as it starts on some, so that none waits."""
        finished: dict[int, list[T]] = {}
        running: dict[Future[list[T]], tuple[int, ProcessPoolExecutor]] = {}
        batches = _batches(jobs, len(self._pools))

        def start(pool: ProcessPoolExecutor) -> None:
            for number, batch in batches:
                running[pool.submit(_in_turn, function, batch)] = number, pool
                break

        try:
            for _ in range(2):
                for pool in self._pools:
                    start(pool)
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    number, pool = running.pop(future)
                    finished[number] = future.result()
                    start(pool)
        except BrokenProcessPool:
            raise LowrankError(
                "a worker process died, most likely for lack of memory; try fewer with -o engine.workers=1"
            ) from None
        return [result for number in sorted(finished) for result in finished[number]]


def _batches(jobs: Sequence[tuple[Any, ...]], workers: int) -> Iterator[tuple[int, Sequence[tuple[Any, ...]]]]:
    """The jobs in numbered batches: large ones first, because handing one over costs a millisecond on both sides,
    and single jobs at the end, so that all workers end together.
    """
    start = 0
    while start < len(jobs):
        size = max(1, (len(jobs) - start) // (2 * workers))
        yield start, jobs[start : start + size]
        start += size


def make_executor(workers: int) -> Executor:
    return InProcess() if workers == 1 else Workers(workers)


def _mean(slices: Sequence[tuple[int, float]], examples: Examples) -> tuple[float, float]:
    count = len(examples.test_labels)
    return sum(correct for correct, _ in slices) / count, sum(loss for _, loss in slices) / count


# What follows runs in the worker processes.

_resident: Resident | None = None


def _start() -> None:
    # Ctrl-C reaches the whole process group; the server alone decides what to do about it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_server, daemon=True).start()


def _end_with_server() -> None:
    """A worker whose server was killed would wait for work for ever."""
    server = multiprocessing.parent_process()
    assert server is not None
    server.join()
    os._exit(1)


def _set_up(model: bytes, examples: Examples, parts: Parts, how: LocalTraining, slots: torch.Tensor) -> None:
    global _resident
    torch.set_num_threads(how.threads)
    map_slots(slots)
    _resident = Resident(pickle.loads(model), examples, parts, how)


def _in_turn(function: Callable[..., T], jobs: Sequence[tuple[Any, ...]]) -> list[T]:
    return [function(*job) for job in jobs]


def _run(messages: Sequence[Message], slots: Sequence[int]) -> list[Message]:
    assert _resident is not None
    return _resident.run_group(messages, slots)


def _evaluate(record: ArrayRecord, start: int) -> tuple[int, float]:
    assert _resident is not None
    return _resident.evaluate(record, start)
