"""Averages of the steps so far, which stand in for the trained factors wherever these are used and not trained."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_diffusion.config import TrainConfig


class Averages:
    """A running average with `train.ema`, schedule-free AdamW's own average, or none.

    The running average is diffusers' `EMAModel`: a <- d a + (1 - d) w after each step, with d = min(ema, (1 + n) /
    (10 + n)) at the n-th step after the first, so that it forgets the start. Schedule-free AdamW (Defazio et al., 2024)
    trains where the gradient is best taken, between its average and its fastest point.
    """

    def __init__(self, train: TrainConfig, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
        """Begin to average.

        Args:
            train: `ema` and `optimizer`.
            optimizer: of the parameters, the package's own.
            parameters: by the names that they have in a checkpoint, on their device.
        """
        from diffusers.training_utils import EMAModel

        self._names, self._parameters = list(parameters), list(parameters.values())
        self._free: Any = optimizer if train.optimizer == "schedulefree" else None
        if self._free is not None:
            self._free.train()
        make: Any = EMAModel
        self._ema: Any = None if train.ema is None else make(self._parameters, decay=train.ema, foreach=True)

    def step(self) -> None:
        """Take in the factors after an optimizer step."""
        if self._ema is not None:
            self._ema.step(self._parameters)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within, the parameters are the average; after it, what they were before, to the bit."""
        if self._ema is None and self._free is None:
            yield
            return
        trained = [parameter.detach().clone() for parameter in self._parameters]
        if self._ema is not None:
            self._ema.copy_to(self._parameters)
        else:
            self._free.eval()
        try:
            yield
        finally:
            if self._free is not None:
                self._free.train()
            # The optimizer's own way back, an extrapolation, would leave other last bits.
            self._fill(trained)

    def state(self) -> dict[str, Tensor]:
        """The running average by the parameters' names; nothing where the optimizer has what there is."""
        return {} if self._ema is None else dict(zip(self._names, self._ema.shadow_params, strict=True))

    def load_state(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Go on with what `state` gave after `step` optimizer steps."""
        if self._ema is not None:
            places = zip(self._names, self._parameters, strict=True)
            self._ema.shadow_params = [tensors[name].to(parameter.device) for name, parameter in places]
            self._ema.optimization_step = step

    @torch.no_grad()
    def _fill(self, tensors: Sequence[Tensor]) -> None:
        for parameter, tensor in zip(self._parameters, tensors, strict=True):
            parameter.copy_(tensor)
