"""The model that clients hold when the server sends them the largest entries of its changes alone."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lowrank_fl.codecs import VALUES, Packed, largest, sparse


class Shadow:
    """Follows a model by its largest differences: what was not sent stays a difference, which is error feedback.

    Versions count the models that were sent, from 1. Every client that is told of version v holds the same numbers, so
    one that comes back after some rounds needs only the entries that have changed since, as they are now.
    """

    def __init__(self, model: Tensor, version: int) -> None:
        self.values = model.clone()
        self.version = version
        self.changed = torch.full((len(model),), version, dtype=torch.int32)
        """The version in which each entry last changed."""
        self.seen: dict[int, int] = {}
        """The newest version that each client surely holds."""

    def advance(self, model: Tensor, version: int, share: float) -> None:
        """Take over the largest differences to a newer model; one that was sent before is sent as it was."""
        if version > self.version:
            entries = largest(model - self.values, share)
            self.values[entries] = model[entries]
            self.changed[entries] = version
            self.version = version

    def news(self, seen: int | None) -> Packed:
        """What brings a client up to date that holds the version `seen`: some entries, or all where that is shorter."""
        if seen is not None:
            entries = (self.changed > seen).nonzero()[:, 0]
            if 2 * len(entries) < len(self.values):
                return sparse(self.values, entries)
        return {VALUES: self.values.numpy().copy()}

    def state(self) -> dict[str, np.ndarray]:
        """Arrays for a checkpoint."""
        clients = sorted(self.seen)
        return {
            "values": self.values.numpy().copy(),
            "changed": self.changed.numpy().copy(),
            "version": np.array(self.version),
            "clients": np.array(clients, np.int64),
            "seen": np.array([self.seen[client] for client in clients], np.int64),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> "Shadow":
        """The shadow that `state` was taken of."""
        shadow = cls(torch.from_numpy(state["values"].copy()), int(state["version"]))
        shadow.changed = torch.from_numpy(state["changed"].copy())
        shadow.seen = dict(zip(state["clients"].tolist(), state["seen"].tolist(), strict=True))
        return shadow
