"""One run of a configuration: its model, its rounds and what it leaves in its folder."""

import math
import time
from pathlib import Path
from typing import Any

import torch

from lowrank_core import LowrankError
from lowrank_fl.aggregation import FactorAggregation
from lowrank_fl.attack import with_poisoned_labels
from lowrank_fl.checkpoint import Checkpoint, base_digest, load_checkpoint, save_checkpoint
from lowrank_fl.clients import examples_of, model_of, parts_of, training_of
from lowrank_fl.config import RunConfig
from lowrank_fl.data.examples import Examples
from lowrank_fl.execution.choice import settle
from lowrank_fl.flower.base_model import BaseModel
from lowrank_fl.flower.engines import Engine
from lowrank_fl.flower.evaluation import evaluate_by_clients
from lowrank_fl.flower.records import ArrayRecord, to_arrays, to_record
from lowrank_fl.flower.rounds import Server
from lowrank_fl.flower.strategies import load_strategy_state, make_private, make_strategy, strategy_state
from lowrank_fl.flower.wire import Wire
from lowrank_fl.folder import RunFolder
from lowrank_fl.interruption import uninterrupted
from lowrank_fl.models.adapted import write_adapter
from lowrank_fl.privacy import epsilon
from lowrank_fl.ranks.allocation import RankAllocation
from lowrank_fl.ranks.layers import fit
from lowrank_fl.reporting.run_page import write_report
from lowrank_fl.results import Evaluation, Observer, RoundRow, RunStart, RunSummary, total_of
from lowrank_fl.state import state_of, trained_names, transferred
from lowrank_fl.summing_up import row_of


class DataCache:
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


class OneRun:
    """One run under way."""

    def __init__(
        self,
        config: RunConfig,
        path: Path,
        swept: dict[str, Any],
        observer: Observer,
        engine: Engine,
        data: DataCache,
    ) -> None:
        self.config, self.path, self.swept = config, path, swept
        self.observer, self.engine = observer, engine
        self.examples = data.load(config)
        self.parts = parts_of(config, self.examples)
        self.folder = RunFolder(path, config)
        self.rows: list[RoundRow] = []
        self.arrays: ArrayRecord | None = None

    def carry_out(self, index: int, count: int) -> RunSummary | None:
        """The summary; marked interrupted after Ctrl-C, None if that came before the first round's end.

        A run that the folder's checkpoint has begun goes on after it. An error leaves the finished rounds and their
        model in the folder too.
        """
        config = self.config
        checkpoint = load_checkpoint(self.path, config)
        self._build(checkpoint)
        self.rows = self.folder.keep_rounds(checkpoint.round if checkpoint else 0)
        sizes = self.params, self.original_params
        self.observer.run_started(RunStart(config.name, index, count, config.method, config.rounds, *sizes, self.swept))
        for row in self.rows:
            self.observer.round_ended(row)
        stop: KeyboardInterrupt | LowrankError | None = None
        try:
            self._train(checkpoint)
        except (KeyboardInterrupt, LowrankError) as caught:
            stop = caught
        summary = None
        if self.arrays is not None:
            summary = self._finish(self.arrays, interrupted=stop is not None)
        if isinstance(stop, LowrankError):
            raise stop
        return summary

    def _build(self, checkpoint: Checkpoint | None) -> None:
        """The model, how clients train it, and what the server keeps of its own beside it."""
        config, examples = self.config, self.examples
        self.model, report = model_of(config, examples)
        self.base_digest = base_digest(self.model)
        if checkpoint and checkpoint.base != self.base_digest:
            over = "adapter" if config.adapter.method else "updates"
            raise LowrankError(
                f"the frozen weights under the {over} of {self.path} are others than it began with; put the run in "
                f"model.start ({config.model.start}) back as it was, or start a new run"
            )
        for entry in report.left if report else ():
            if entry.reason not in ("excluded", "not included"):
                self.observer.note(f"{entry.name} stays as it is: {entry.reason}")
        self.params = report.params if report else sum(parameter.numel() for parameter in self.model.parameters())
        self.original_params = report.original_params if report else self.params
        self.base = BaseModel.of(self.model, config.update.interval, config.engine.threads)
        self.ranks = RankAllocation.of(self.model, config.rounds)
        self.how = training_of(config, self.path / "clients")
        if config.engine.execution == "auto":
            self.how = settle(self.model, examples, self.parts, self.how, config, self.path, self.observer.note)
        self.state = transferred(self.model, self.how.personalization)
        self.transferred_params = sum(tensor.numel() for tensor in self.state.values())
        # What is each client's own stands in the run's model as all clients begin with it.
        self.initial = {name: tensor.numpy().copy() for name, tensor in state_of(self.model).items()}

    def _train(self, checkpoint: Checkpoint | None) -> None:
        """The rounds that are left, each one written as it ends."""
        config, federation, done = self.config, self.config.federation, checkpoint.round if checkpoint else 0
        trained_on = with_poisoned_labels(config.attack, self.examples, self.parts, config.seed)
        grid = self.engine.set_up(config, self.model, trained_on, self.parts, self.how)
        # In the model's order, which a file does not keep.
        start = {name: checkpoint.model[name] for name in self.state} if checkpoint else self.state
        arrays = to_record(start, shared=self.engine.shared)
        names = trained_names(self.model, self.how.personalization)
        strategy = make_strategy(config.strategy, federation, names)
        others, sampled = self.state.keys() - set(names), federation.clients_per_round
        strategy = make_private(strategy, config.privacy, sampled, config.seed, others)
        epsilon(config, done + 1)  # so that what it needs is missed before anything is trained
        wire = Wire(config.codec, config.seed, self.base)
        if checkpoint:
            load_strategy_state(strategy, checkpoint.strategy, arrays)
            if self.ranks:
                self.ranks.load_state(checkpoint.ranks)
            wire.load_state(checkpoint.wire)
            self.arrays = self._merged(arrays)
        server = Server(
            strategy,
            grid,
            federation,
            wire,
            config.seed,
            examples=[len(rows) for rows in self.parts.train],
            aggregation=FactorAggregation(config.aggregation, self.model, config.engine.threads),
            ranks=self.ranks,
            privacy=config.privacy,
            failures=config.failures,
        )
        for trained in server.rounds(arrays, config.rounds, done + 1):
            began = time.perf_counter()
            merged = self._merged(trained.arrays)
            if config.partition.held_out:
                found = evaluate_by_clients(strategy, grid, trained.arrays, federation, wire, trained.number)
            else:
                found = self._evaluate(trained.number, merged)
            row = row_of(trained, found, epsilon(config, trained.number), time.perf_counter() - began)
            carried = Checkpoint(
                trained.number,
                to_arrays(trained.arrays),
                strategy_state(strategy),
                wire.state(),
                self.base_digest,
                self.ranks.state() if self.ranks else {},
            )
            with uninterrupted():  # else the summary could tell of another number of rounds than metrics.jsonl
                self.folder.add_round(row)
                save_checkpoint(self.path, config, carried)
                self.rows.append(row)
                self.arrays = merged
            self.observer.round_ended(row)

    def _finish(self, arrays: ArrayRecord, *, interrupted: bool) -> RunSummary:
        """Write what the finished rounds came to."""
        if self.config.adapter.method == "adalora":
            dropped = self.transferred_params - sum(array.size for array in to_arrays(arrays).values())
            self.params, self.transferred_params = self.params - dropped, self.transferred_params - dropped
        whole = self.initial | to_arrays(arrays)
        if self.base:
            whole = {name: array for name, array in whole.items() if name not in self.base.updates.names}
        self.folder.save_model(whole, self.config, self.examples)
        if self.config.adapter.method is not None:
            # A model of its own, because clients may be training the run's.
            model, _ = model_of(self.config, self.examples)
            fit(model, whole)
            model.load_state_dict({name: torch.from_numpy(array) for name, array in whole.items()}, strict=False)
            write_adapter(model, self.config.model.name, self.config.adapter, self.path / "adapter")
        summary = self._summary(interrupted)
        self.folder.save_summary(summary)
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
            execution=self.how.execution,
            epsilon=last.epsilon,
            simulated_seconds=total_of(row.simulated_seconds for row in rows),
            waited_seconds=total_of(row.waited_seconds for row in rows),
        )
