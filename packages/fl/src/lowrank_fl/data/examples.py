"""Labelled examples as tensors, and which client holds which."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Examples:
    """A classification data set held in memory.

    Pictures stay bytes, because a float copy of CIFAR-10 alone is 600 MB; `normalize`
    turns a batch into what a model reads.
    """

    name: str
    inputs: Tensor
    """uint8, `(n, channels, height, width)` pixels or `(n, characters)` symbol numbers; int32 `(n, tokens)`."""
    labels: Tensor
    """int64, `(n,)`."""
    test_inputs: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...] = ()
    """Of the training pixels, per channel, in units of `inputs`; empty for text."""
    std: tuple[float, ...] = ()
    groups: np.ndarray | None = None
    """`(n,)` strings: who made each training example (writer, role), where that is known."""
    white: int = 255
    """The brightest value a pixel can have, in units of `inputs`."""

    @property
    def is_text(self) -> bool:
        return not self.mean

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.inputs.shape[1:])

    def chosen(self, train: np.ndarray | None, test: np.ndarray | None) -> "Examples":
        """Only these rows, by number or by a mask; all of them for None or where none is left out."""
        examples = self
        if train is not None and len(train_rows := np.arange(len(self.labels))[train]) < len(self.labels):
            groups = None if self.groups is None else self.groups[train_rows]
            examples = replace(examples, inputs=self.inputs[train_rows], labels=self.labels[train_rows], groups=groups)
        if test is not None and len(test_rows := np.arange(len(self.test_labels))[test]) < len(self.test_labels):
            examples = replace(
                examples, test_inputs=self.test_inputs[test_rows], test_labels=self.test_labels[test_rows]
            )
        return examples

    def normalize(self, inputs: Tensor) -> Tensor:
        """Pixels as float32 with zero mean and unit variance per channel; symbols as int64."""
        if self.is_text:
            return inputs.long()
        mean = torch.tensor(self.mean, device=inputs.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=inputs.device).view(-1, 1, 1)
        return (inputs.float() - mean) / std


@dataclass(frozen=True)
class Parts:
    """Who holds which of the training examples: row numbers, ascending, for each client."""

    train: list[np.ndarray]
    held_out: list[np.ndarray]
    """What clients test on; empty where the server does."""

    def __len__(self) -> int:
        return len(self.train)
