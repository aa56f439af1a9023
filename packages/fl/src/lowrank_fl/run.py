"""`lowrank fl run`: the runs of a configuration, from data to files."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from lowrank_core import LowrankError, UsageError
from lowrank_core.run_folder import config_file, locked, prepare, take_back_config
from lowrank_fl.aggregation import FactorAggregation
from lowrank_fl.attack import with_poisoned_labels
from lowrank_fl.checkpoint import Checkpoint, base_digest, load_checkpoint, save_checkpoint
from lowrank_fl.clients import examples_of, model_of, parts_of, training_of
from lowrank_fl.config import RunConfig
from lowrank_fl.data.examples import Examples
from lowrank_fl.execution.choice import settle
from lowrank_fl.flower.base_model import BaseModel
from lowrank_fl.flower.engines import Engine, make_engine
from lowrank_fl.flower.evaluation import evaluate_by_clients
from lowrank_fl.flower.records import ArrayRecord, to_arrays, to_record
from lowrank_fl.flower.rounds import TrainedRound, train_rounds
from lowrank_fl.flower.strategies import load_strategy_state, make_private, make_strategy, strategy_state
from lowrank_fl.flower.wire import Wire
from lowrank_fl.folder import RunFolder, finished_rounds, read_summary, run_name, write_config
from lowrank_fl.load import expand, load_to_resume
from lowrank_fl.models.adapted import write_adapter
from lowrank_fl.privacy import epsilon
from lowrank_fl.ranks.allocation import RankAllocation
from lowrank_fl.ranks.layers import fit
from lowrank_fl.reporting.run_page import write_report
from lowrank_fl.results import Evaluation, Observer, RoundRow, RunStart, RunSummary, total_of
from lowrank_fl.state import state_of, trained_names, transferred


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
    data = _DataCache()
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
            summary = _Run(single, path, swept, observer, engine, data).carry_out(index, len(runs))
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


class _DataCache:
    """The last data set loaded: the runs of a sweep mostly share it."""

    def __init__(self) -> None:
        self._key: object = None
        self._examples: Examples | None = None

    def load(self, config: RunConfig) -> Examples:
        subset = config.data.max_examples or config.data.max_test_examples
        partition = config.partition
        key = (
            config.data,
            config.model.name,
            partition.kind,
            partition.id_column,
            partition.held_out > 0,
            subset and config.seed,
        )
        if self._examples is None or key != self._key:
            self._examples = examples_of(config)
            self._key = key
        return self._examples


class _Run:
    """One run under way."""

    def __init__(
        self,
        config: RunConfig,
        path: Path,
        swept: dict[str, Any],
        observer: Observer,
        engine: Engine,
        data: _DataCache,
    ) -> None:
        self.config, self.path, self.swept = config, path, swept
        self.observer, self.engine = observer, engine
        self.examples = data.load(config)
        self.rows: list[RoundRow] = []
        self.arrays: ArrayRecord | None = None

    def carry_out(self, index: int, count: int) -> RunSummary | None:
        """The summary; marked interrupted after Ctrl-C, None if that came before the first round's end.

        A run that the folder's checkpoint has begun goes on after it. An error leaves the finished rounds and their
        model in the folder too.
        """
        config, examples = self.config, self.examples
        checkpoint = load_checkpoint(self.path, config)
        done = checkpoint.round if checkpoint else 0
        federation = config.federation
        parts = parts_of(config, examples)
        model, report = model_of(config, examples)
        base = base_digest(model)
        if checkpoint and checkpoint.base != base:
            over = "adapter" if config.adapter.method else "updates"
            raise LowrankError(
                f"the frozen weights under the {over} of {self.path} are others than it began with; put the run in "
                f"model.start ({config.model.start}) back as it was, or start a new run"
            )
        for entry in report.left if report else ():
            if entry.reason not in ("excluded", "not included"):
                self.observer.note(f"{entry.name} stays as it is: {entry.reason}")
        self.params = report.params if report else sum(parameter.numel() for parameter in model.parameters())
        self.original_params = report.original_params if report else self.params
        self.base = BaseModel.of(model, config.update.interval, config.engine.threads)
        ranks = RankAllocation.of(model, config.rounds)
        how = training_of(config, self.path / "clients")
        if config.engine.execution == "auto":
            how = settle(model, examples, parts, how, config, self.path, self.observer.note)
        self.execution = how.execution
        self.transferred_params = sum(t.numel() for t in transferred(model, how.personalization).values())
        # What is each client's own stands in the run's model as all clients begin with it.
        self.initial = {name: tensor.numpy().copy() for name, tensor in state_of(model).items()}
        folder = RunFolder(self.path, config)
        self.rows = folder.keep_rounds(done)
        self.observer.run_started(
            RunStart(
                config.name,
                index,
                count,
                config.method,
                config.rounds,
                self.params,
                self.original_params,
                self.swept,
            )
        )
        for row in self.rows:
            self.observer.round_ended(row)
        stop: KeyboardInterrupt | LowrankError | None = None
        try:
            trained_on = with_poisoned_labels(config.attack, examples, parts, config.seed)
            grid = self.engine.set_up(config, model, trained_on, parts, how)
            state = transferred(model, how.personalization)
            # In the model's order, which a file does not keep.
            start = {name: checkpoint.model[name] for name in state} if checkpoint else state
            arrays = to_record(start, shared=self.engine.shared)
            names = trained_names(model, how.personalization)
            strategy = make_strategy(config.strategy, federation, names)
            others, sampled = state.keys() - set(names), federation.clients_per_round
            strategy = make_private(strategy, config.privacy, sampled, config.seed, others)
            epsilon(config, done + 1)  # so that what it needs is missed before anything is trained
            if checkpoint:
                load_strategy_state(strategy, checkpoint.strategy, arrays)
                if ranks:
                    ranks.load_state(checkpoint.ranks)
            wire = Wire(config.codec, config.seed, self.base)
            if checkpoint:
                wire.load_state(checkpoint.wire)
                self.arrays = self._merged(arrays)
            for trained in train_rounds(
                strategy,
                grid,
                arrays,
                federation,
                wire,
                rounds=config.rounds,
                seed=config.seed,
                first=done + 1,
                examples=[len(rows) for rows in parts.train],
                aggregation=FactorAggregation(config.aggregation, model, config.engine.threads),
                ranks=ranks,
                privacy=config.privacy,
                failures=config.failures,
            ):
                began = time.perf_counter()
                merged = self._merged(trained.arrays)
                if config.partition.held_out:
                    found = evaluate_by_clients(strategy, grid, trained.arrays, federation, wire, trained.number)
                else:
                    found = self._evaluate(trained.number, merged)
                row = _row(trained, found, epsilon(config, trained.number), time.perf_counter() - began)
                folder.add_round(row)
                carried = Checkpoint(
                    trained.number,
                    to_arrays(trained.arrays),
                    strategy_state(strategy),
                    wire.state(),
                    base,
                    ranks.state() if ranks else {},
                )
                save_checkpoint(self.path, config, carried)
                self.rows.append(row)
                self.arrays = merged
                self.observer.round_ended(row)
        except (KeyboardInterrupt, LowrankError) as caught:
            stop = caught
        summary = None
        if self.arrays is not None:
            summary = self._finish(folder, self.arrays, interrupted=stop is not None)
        if isinstance(stop, LowrankError):
            raise stop
        return summary

    def _finish(self, folder: RunFolder, arrays: ArrayRecord, *, interrupted: bool) -> RunSummary:
        """Write what the finished rounds came to."""
        if self.config.adapter.method == "adalora":
            dropped = self.transferred_params - sum(array.size for array in to_arrays(arrays).values())
            self.params, self.transferred_params = self.params - dropped, self.transferred_params - dropped
        whole = self.initial | to_arrays(arrays)
        if self.base:
            whole = {name: array for name, array in whole.items() if name not in self.base.updates.names}
        folder.save_model(whole, self.config, self.examples)
        if self.config.adapter.method is not None:
            # A model of its own, because clients may be training the run's.
            model, _ = model_of(self.config, self.examples)
            fit(model, whole)
            model.load_state_dict({name: torch.from_numpy(array) for name, array in whole.items()}, strict=False)
            write_adapter(model, self.config.model.name, self.config.adapter, self.path / "adapter")
        summary = self._summary(interrupted)
        folder.save_summary(summary)
        write_report(self.path, [summary])
        self.observer.run_ended(summary)
        return summary

    def _merged(self, arrays: ArrayRecord) -> ArrayRecord:
        """The model that the last round left, as it is tested and saved: without updates."""
        return to_record(self.base.whole(to_arrays(arrays)), shared=self.engine.shared) if self.base else arrays

    def _evaluate(self, number: int, arrays: ArrayRecord) -> Evaluation:
        accuracy, loss = self.engine.evaluate(arrays)
        if not math.isfinite(loss):
            raise LowrankError(
                f"the model of round {number} has loss {loss} on the test set; "
                f"lower federation.lr (now {self.config.federation.lr:g})"
            )
        return Evaluation(accuracy, loss)

    def _summary(self, interrupted: bool) -> RunSummary:
        rows, last = self.rows, self.rows[-1]
        return RunSummary(
            name=self.config.name,
            run_dir=str(self.path),
            method=self.config.method,
            seed=self.config.seed,
            rounds=len(rows),
            accuracy=last.accuracy,
            loss=last.loss,
            params=self.params,
            transferred_params=self.transferred_params,
            original_params=self.original_params,
            uplink_bytes=sum(row.uplink_bytes for row in rows),
            downlink_bytes=sum(row.downlink_bytes for row in rows),
            total_bytes=sum(row.total_bytes for row in rows),
            seconds=sum(row.seconds for row in rows),
            interrupted=interrupted,
            swept=self.swept,
            worst_accuracy=last.worst_accuracy,
            client_accuracies=last.client_accuracies,
            evaluation_bytes=sum(row.evaluation_bytes for row in rows),
            execution=self.execution,
            epsilon=last.epsilon,
            simulated_seconds=total_of(row.simulated_seconds for row in rows),
            waited_seconds=total_of(row.waited_seconds for row in rows),
        )


def _row(trained: TrainedRound, found: Evaluation, spent: float | None, seconds: float) -> RoundRow:
    """The round's line; `spent` is its ε, `seconds` are the evaluation's."""
    simulated = trained.simulated
    dropped = {str(client): reason for client, reason in trained.dropped.items()}
    for client, reason in found.dropped.items():
        before = dropped.get(str(client))
        dropped[str(client)] = f"{before}; testing: {reason}" if before else f"testing: {reason}"
    return RoundRow(
        round=trained.number,
        accuracy=found.accuracy,
        loss=found.loss,
        train_loss=trained.train_loss,
        uplink_bytes=trained.uplink_bytes,
        downlink_bytes=trained.downlink_bytes,
        total_bytes=trained.uplink_bytes + trained.downlink_bytes,
        seconds=trained.seconds + seconds,
        clients=trained.clients,
        dropped=dropped,
        worst_accuracy=found.worst_accuracy,
        client_accuracies=found.client_accuracies,
        evaluation_bytes=found.sent_bytes,
        aggregation_gap=trained.found.gap,
        layer_gaps=trained.found.layer_gaps,
        refit_residual=trained.found.residual,
        rank=sum(trained.ranks.values()) if trained.ranks else None,
        layer_ranks=trained.ranks,
        epsilon=spent,
        simulated_seconds=simulated.seconds if simulated else None,
        waited_seconds=simulated.waited if simulated else None,
    )
