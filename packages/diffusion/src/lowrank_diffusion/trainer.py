"""The training loop: examples in, optimizer steps out."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lowrank_core.compilation import compile
from lowrank_core.errors import LowrankError
from lowrank_diffusion.adapting import Adapters
from lowrank_diffusion.averages import Averages
from lowrank_diffusion.blocks import recompute
from lowrank_diffusion.checkpoint import Checkpoint, named_state, numbered_state
from lowrank_diffusion.config import DiffusionConfig
from lowrank_diffusion.devices import average_gradients, gathered, peak_memory
from lowrank_diffusion.encoding import Text
from lowrank_diffusion.examples import Batch, Examples
from lowrank_diffusion.noise import TrainingNoise
from lowrank_diffusion.optimizers import build_optimizer, build_schedule
from lowrank_diffusion.results import StepRow
from lowrank_diffusion.seeds import derive_seed
from lowrank_diffusion.validation import validation_losses

WINDOW = 20
"""Steps whose mean loss is held against `train.loss_limit`, and which a run's loss is the mean of."""


class Diverged(LowrankError):
    """The loss or the gradient is no number any more, or the loss is far too large."""


class Trainer:
    """Optimizer, schedule and ranks of one run, and the steps they take."""

    def __init__(
        self,
        config: DiffusionConfig,
        accelerator: Any,
        adapters: Adapters,
        examples: Examples,
        noise: TrainingNoise,
        prior: Examples | None = None,
    ) -> None:
        """Put an optimizer on adapters that lie on their device.

        Args:
            config: of the run.
            accelerator: of this process.
            adapters: what is trained.
            examples: what it is trained on.
            noise: the loss of both kinds of examples.
            prior: examples of the class, as many besides.

        Raises:
            LowrankError: what the optimizer or the schedule of ranks raises.
        """
        train = config.train
        self.config, self.accelerator, self.adapters = config, accelerator, adapters
        self.examples, self.noise = examples, noise
        self._kinds = [(examples, 1.0), *([] if prior is None else [(prior, config.prior.weight)])]
        self.device: torch.device = accelerator.device
        self.dtype = next(p.dtype for p in adapters.unet.parameters() if not p.requires_grad)
        texts = [parameter for place in adapters.text_places for parameter in adapters.parameters(place)]
        plain = build_optimizer(
            train,
            adapters.parameters("unet"),
            texts,
            adapters.rate_factors(train.lr_pattern),
            word=[] if adapters.word is None else adapters.word.parameters(),
            word_lr=config.pivotal.lr,
            magnitudes=adapters.magnitudes,
        )
        self.allocator = adapters.adapt_ranks(plain, config.adapter, train.steps)
        self.schedule = build_schedule(train, plain)
        self.optimizer = accelerator.prepare(plain)
        self._plain = plain
        names = {parameter: name for name, parameter in adapters.named_parameters().items()}
        # In the order in which the optimizer numbers them.
        self._names = [names[parameter] for group in plain.param_groups for parameter in group["params"]]
        self.averages = Averages(train, plain, adapters.named_parameters())
        first = accelerator.process_index * train.accumulate
        # This process's places in every global batch, forward by forward.
        self._forwards = [
            range(number * train.batch_size, (number + 1) * train.batch_size)
            for number in range(first, first + train.accumulate)
        ]
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._skipped = 0
        self.step = 0
        """Finished optimizer steps."""
        if train.checkpointing:
            self._recompute()
        if train.compile:
            compile(adapters.unet)
        adapters.train(True)

    @property
    def global_batch(self) -> int:
        train = self.config.train
        return train.batch_size * train.accumulate * self.accelerator.num_processes

    def checkpoint(self) -> Checkpoint:
        """The state after the last finished step."""
        optimizer = named_state(self._plain.state_dict(), self._names)
        return Checkpoint(self.step, self.adapters.state(), optimizer, self.averages.state())

    def load(self, checkpoint: Checkpoint, losses: list[float]) -> None:
        """Go on after a checkpoint; `losses` are those of the steps before it.

        Raises:
            LowrankError: it does not fit the adapters.
        """
        # First the optimizer's, with which ranks fall to what the factors have.
        self._plain.load_state_dict(numbered_state(checkpoint.optimizer, self._names))
        self.adapters.load_state(checkpoint.adapters)
        self.averages.load_state(checkpoint.averages, checkpoint.step)
        self.schedule.last_epoch = self.step = checkpoint.step
        self._recent.extend(losses)

    def fall_back(self, checkpoint: Checkpoint) -> None:
        """Take an earlier step's factors and averages, to be saved and not trained."""
        self.adapters.load_state(checkpoint.adapters)
        # AdaLoRA's optimizer cannot go back to larger ranks, and holds no average.
        if self.allocator is None:
            self._plain.load_state_dict(numbered_state(checkpoint.optimizer, self._names))
        self.averages.load_state(checkpoint.averages, checkpoint.step)
        self.step = checkpoint.step

    def steps(self, stop: Callable[[], bool]) -> Iterator[tuple[StepRow, bool]]:
        """Take the steps that are left; a row for each, and whether `stop` said so in some process.

        Raises:
            Diverged: a loss or gradient is not finite; its step has changed no weight.
        """
        while self.step < self.config.train.steps:
            began = time.perf_counter()
            loss, peak, stopped = self._step(stop)
            seconds = time.perf_counter() - began
            self.step += 1
            self._recent.append(loss)
            yield StepRow(self.step, loss, self._rate, self.global_batch / seconds, peak, seconds), stopped

    def check_mean(self) -> None:
        """Raise `Diverged` where the mean loss of the last steps is above the limit."""
        mean, limit = sum(self._recent) / len(self._recent), self.config.train.loss_limit
        if len(self._recent) == WINDOW and mean > limit:
            raise self._diverged(
                f"the mean loss of the {WINDOW} steps to {self.step} is {mean:.4g}, above train.loss_limit {limit:g}"
            )

    @torch.no_grad()
    def validation_loss(self) -> float | None:
        """The mean over held-out pictures and time steps; None where no picture is held out."""
        with self.averages.used():
            pictures = self.examples.held_out()
            if not pictures:
                return None
            self.adapters.train(False)
            share = pictures[self.accelerator.process_index :: self.accelerator.num_processes]
            losses = validation_losses(self.noise, share, self._predict, device=self.device)
            self.adapters.train(True)
        sums = gathered(self.accelerator, losses.sum(), float(losses.numel()))
        return sum(total for total, _ in sums) / sum(count for _, count in sums)

    def _step(self, stop: Callable[[], bool]) -> tuple[float, int, bool]:
        train, accelerator, word = self.config.train, self.accelerator, self.adapters.word
        if word is not None:
            word.begin(self.step)
        total = torch.zeros((), device=self.device)
        for places in self._forwards:
            for examples, weight in self._kinds:
                loss = weight * self._loss(examples.batch(self.step, places), places)
                accelerator.backward(loss / train.accumulate)
                total += loss.detach() / train.accumulate
        told = gathered(accelerator, total, float(stop()), float(peak_memory(self.device)))
        loss = sum(each[0] for each in told) / len(told)
        if not math.isfinite(loss):
            raise self._diverged(f"the loss of step {self.step + 1} is {loss}")
        parameters = [p for group in self._plain.param_groups for p in group["params"]]
        average_gradients(accelerator, parameters)
        self._check_norm(accelerator.clip_grad_norm_(parameters, train.clip or math.inf))
        self._rate = self._plain.param_groups[0]["lr"]
        self.optimizer.step()
        if train.scale_weight_norms is not None:
            self.adapters.limit_norms(train.scale_weight_norms)
        if word is not None:
            word.end()
        self.schedule.step()
        self.averages.step()
        self.optimizer.zero_grad()
        return loss, int(max(each[2] for each in told)), any(each[1] for each in told)

    def _loss(self, batch: Batch, places: range) -> Tensor:
        settings = self.config.adapter
        if settings.dropout or settings.rank_dropout or settings.module_dropout:
            torch.manual_seed(derive_seed(self.config.seed, "dropout", self.step, places[0]))
        predicted = self._predict(batch.noisy, batch.times, batch.text, batch.time_ids)
        return self.noise.loss(predicted, batch.target, batch.times, batch.mask)

    def _predict(self, noisy: Tensor, times: Tensor, text: Text, time_ids: Tensor) -> Tensor:
        unet: Any = self.adapters.unet
        text = text.to(dtype=self.dtype)
        # Without pooled text the UNet takes no sizes either.
        added = {"text_embeds": text.pooled, "time_ids": time_ids} if text.pooled.numel() else None
        return unet(
            noisy.to(self.dtype), times, encoder_hidden_states=text.hidden, added_cond_kwargs=added, return_dict=False
        )[0]

    def _check_norm(self, norm: Tensor) -> None:
        if math.isfinite(float(norm)):
            self._skipped = 0
            return
        # The scaler of fp16 skips such steps, and lowers its scale, until gradients fit.
        self._skipped += 1
        if self.config.train.precision != "fp16" or self._skipped > WINDOW:
            raise self._diverged(f"the gradient of step {self.step + 1} is not finite")

    def _diverged(self, what: str) -> Diverged:
        return Diverged(f"{what}; lower train.lr (now {self.config.train.lr:g})")

    def _recompute(self) -> None:
        recompute(self.adapters.unet, int(self.config.train.checkpointing))
        for place in self.adapters.text_places:
            encoder: Any = self.adapters.networks[place]
            # The older name goes with transformers 6, the newer one came on the way there.
            if hasattr(encoder, "activation_checkpointing_enable"):
                encoder.activation_checkpointing_enable()
            else:
                encoder.gradient_checkpointing_enable()
