"""One process's part in a fine-tuning run, from its configuration to its files."""

import dataclasses
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lowrank_core.adapters.control import disable
from lowrank_core.errors import LowrankError
from lowrank_diffusion.adapting import check_targets, networks_of, put_adapters
from lowrank_diffusion.ahead import encoded_ahead
from lowrank_diffusion.base import DTYPES, load_base
from lowrank_diffusion.checkpoint import load_checkpoint, run_digest, save_checkpoint
from lowrank_diffusion.config import DiffusionConfig
from lowrank_diffusion.examples import Examples
from lowrank_diffusion.families import family_of
from lowrank_diffusion.folder import Metrics, missing_forms, write_summary
from lowrank_diffusion.material import find_material
from lowrank_diffusion.noise import training_noise
from lowrank_diffusion.offloading import Offloaded
from lowrank_diffusion.outputs import write_outputs
from lowrank_diffusion.pivotal import check_captions
from lowrank_diffusion.prior import prior_run
from lowrank_diffusion.pushing import check_repository, push
from lowrank_diffusion.quantizing import bitsandbytes, quantize
from lowrank_diffusion.results import Observer, RunStart, RunSummary, StepRow
from lowrank_diffusion.samples import Sampler, save_grid
from lowrank_diffusion.stopping import stop_requests
from lowrank_diffusion.tracking import Trackers, check_trackers, tracked
from lowrank_diffusion.trainer import WINDOW, Diverged, Trainer


class Interrupted(LowrankError):
    """Ctrl-C or SIGTERM: every finished step is on disk."""

    exit_code = 130

    def __init__(self, folder: Path, summary: RunSummary) -> None:
        super().__init__(
            f"interrupted after {summary.steps} finished steps, which are kept in {folder}; "
            f"go on with lowrank diffusion train --resume {folder}"
        )
        self.summary = summary


class OneRun:
    """One process's part in a run under way."""

    def __init__(self, config: DiffusionConfig, folder: Path, observer: Observer, accelerator: Any) -> None:
        self.config, self.folder, self.observer, self.accelerator = config, folder, observer, accelerator
        train = config.train
        self.main: bool = accelerator.is_main_process
        self.global_batch = train.batch_size * train.accumulate * accelerator.num_processes
        # Before anything is fetched.
        if config.base.quantize != "none":
            bitsandbytes()
        if self.main:
            check_trackers(config.track)
            check_repository(config.hub)
        self.material = find_material(config, self.global_batch, observer.note)
        check_captions(config, self.material.captions, observer.note)
        self.pipeline: Any = load_base(
            config.base.path,
            config.base.vae,
            config.base.revision,
            DTYPES[train.precision],
            observer.note,
            config=config.base.config,
        )
        if config.adapter.init_from is None:
            check_targets(networks_of(self.pipeline, config.adapter), config.adapter)
        runs = [(config, self.material)]
        if config.prior.caption is not None:
            runs.append(prior_run(config, self.pipeline, accelerator, self.global_batch, observer))
        pictures = "".join(material.digest for _, material in runs)
        self.digest = run_digest(config, pictures, accelerator.num_processes)
        checkpoint = load_checkpoint(folder, self.digest)
        self.adapters = put_adapters(self.pipeline, config, observer.note)
        if (missing := missing_forms(config)) is not None:
            observer.note(missing)
        self.noise = training_noise(self.pipeline.scheduler.config, config.loss, config.seed)
        words = [] if self.adapters.word is None else [self.adapters.word]
        latents, text = encoded_ahead(config, self.pipeline, accelerator, runs, words, observer)
        # Only now, when what is cached has left the device.
        if config.base.quantize != "none":
            quantize(self.pipeline.unet, config.base.quantize, accelerator.device)
        if train.offload:
            Offloaded(self.pipeline.unet, None if train.offload is True else train.offload, accelerator.device)
        self.pipeline.unet.to(accelerator.device)
        examples = [
            Examples(each, material, encoded, text, dataclasses.replace(self.noise, seed=each.seed), accelerator.device)
            for (each, material), encoded in zip(runs, latents, strict=True)
        ]
        self.trainer = Trainer(config, accelerator, self.adapters, examples[0], self.noise, *examples[1:])
        self.sampler = Sampler(config, self.pipeline, self.adapters, text)
        self.metrics = Metrics(folder)
        self.trackers = Trackers([])
        self.rows: list[StepRow] = []
        if checkpoint is not None:
            self.rows = self.metrics.keep(checkpoint.step) if self.main else self.metrics.read()[: checkpoint.step]
            self.trainer.load(checkpoint, [row.loss for row in self.rows[-WINDOW:]])
        elif self.main:
            self.metrics.keep(0)
        self.base_loss = self._base_loss()

    def carry_out(self) -> RunSummary:
        config, trainer = self.config, self.trainer
        self.observer.run_started(
            RunStart(
                config.name,
                config.adapter.described,
                config.train.steps,
                trainer.step,
                self.adapters.size,
                len(self.material.trained),
                str(self.accelerator.device),
            )
        )
        self.trained = self.adapters.size
        interrupted = False
        with ExitStack() as opened:
            if self.main:
                self.trackers = opened.enter_context(tracked(self.folder, config, self.observer.note))
            stop = opened.enter_context(stop_requests())
            if trainer.step == 0:
                self._sample()
            try:
                for row, stopped in trainer.steps(stop):
                    last = row.step == config.train.steps
                    if last or row.step % config.track.validate_every == 0:
                        row = dataclasses.replace(row, validation_loss=trainer.validation_loss())
                    self.rows.append(row)
                    if self.main:
                        self.metrics.add(row)
                    self.trackers.row(row)
                    self.observer.step_ended(row)
                    trainer.check_mean()
                    if last or stopped or row.step % config.train.checkpoint_every == 0:
                        self._save_checkpoint()
                    if last or row.step % config.sample.every == 0:
                        self._sample()
                    if stopped and not last:
                        interrupted = True
                        break
            except Diverged as error:
                self._fall_back(error)
        if trainer.allocator is not None and not interrupted:
            # Several processes leave pruned directions in place while they train.
            trainer.allocator.shrink()
        summary = self._finish(interrupted=interrupted)
        if interrupted:
            raise Interrupted(self.folder, summary)
        if self.main and config.hub.push is not None:
            self._push(config.hub.push)
        return summary

    def _base_loss(self) -> float | None:
        with ExitStack() as switched_off:
            for network in self.adapters.networks.values():
                switched_off.enter_context(disable(network))
            if self.adapters.word is not None:
                switched_off.enter_context(self.adapters.word.silenced())
            return self.trainer.validation_loss()

    def _sample(self) -> None:
        if self.main and self.config.sample.prompts:
            with self.trainer.averages.used():
                grid = save_grid(self.folder, self.trainer.step, self.sampler.draw())
            self.trackers.samples(self.trainer.step, grid)
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self) -> None:
        if self.main:
            save_checkpoint(self.folder, self.digest, self.trainer.checkpoint(), self.config.train.keep_checkpoints)
            # The last one goes with the finished run.
            if self.config.hub.checkpoints and self.trainer.step < self.config.train.steps:
                try:
                    push(self.folder, self.config.hub, self.observer.note)
                except LowrankError as error:
                    self.observer.note(f"{error}; training goes on")
        self.accelerator.wait_for_everyone()

    def _push(self, repository: str) -> None:
        """Push the finished run; what fails there has cost no training."""
        try:
            pushed = push(self.folder, self.config.hub, self.observer.note)
        except LowrankError as error:
            raise LowrankError(
                f"the run is finished and kept in {self.folder}, but {error}; mend that, and push it by "
                f"lowrank diffusion push {self.folder} {repository}"
            ) from error
        self.observer.note(f"pushed: {pushed.url}")

    def _fall_back(self, error: Diverged) -> None:
        """Write the adapter of the last checkpoint, and say so."""
        checkpoint = load_checkpoint(self.folder, self.digest)
        if checkpoint is None:
            raise Diverged(f"{error}; there was no checkpoint yet") from None
        self.trainer.fall_back(checkpoint)
        del self.rows[checkpoint.step :]
        self._finish(interrupted=True)
        raise Diverged(f"{error}; {self.folder} holds the adapter of step {checkpoint.step}, its last checkpoint")

    def _finish(self, *, interrupted: bool) -> RunSummary:
        """Write what the finished steps came to."""
        summary = self._summary(interrupted)
        if self.main:
            with self.trainer.averages.used():
                write_outputs(
                    self.folder,
                    self.config,
                    self.adapters,
                    self.material,
                    summary,
                    self.noise,
                    family_of(self.pipeline),
                    self.observer.note,
                )
            # Last, since a run that has one is finished.
            write_summary(self.folder, summary)
        self.accelerator.wait_for_everyone()
        self.observer.run_ended(summary)
        return summary

    def _summary(self, interrupted: bool) -> RunSummary:
        rows = self.rows
        measured = [row.validation_loss for row in rows if row.validation_loss is not None]
        return RunSummary(
            name=self.config.name,
            run_dir=str(self.folder),
            method=self.config.adapter.described,
            seed=self.config.seed,
            steps=len(rows),
            loss=statistics.fmean(row.loss for row in rows[-WINDOW:]),
            validation_loss=measured[-1] if measured else None,
            base_validation_loss=self.base_loss,
            images_per_second=statistics.median(row.images_per_second for row in rows),
            peak_memory_bytes=max(row.peak_memory_bytes for row in rows),
            trainable_params=self.trained,
            seconds=sum(row.seconds for row in rows),
            interrupted=interrupted,
        )
