"""The weights under updates: how the server keeps clients' copies up to date.

A message's `arrays` are the mean factors that the round before left, with what is trained whole. Who holds the weights
of the period before merges them itself. Who holds older ones also gets the record `missed`, the factors that ended the
periods since, or, where that is shorter, the weights as `dense`. The config's `held-period` says which weights the
server counts on, those of period 0 being the initial ones, which everybody builds from the configuration.
"""

from collections.abc import Iterable, Mapping, Sequence

import flwr.app
import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from torch import nn

from lowrank_fl.flower.codecs.content import wrap
from lowrank_fl.flower.grid import client_of
from lowrank_fl.packing import Arrays
from lowrank_fl.timing import torch_threads
from lowrank_fl.updates.periods import Updates

MISSED, DENSE, HELD = "missed", "dense", "held-period"


class BaseModel:
    """The server's weights under the updates of a run, and which of them each client holds.

    threads: that torch computes with here; clients' bits are the server's where they compute with as many.
    """

    def __init__(self, updates: Updates, threads: int = 1) -> None:
        self.updates, self._threads = updates, threads
        self.weights = {name: weight.cpu().numpy().copy() for name, weight in updates.weights.items()}
        self.finished = 0
        """Rounds."""
        self._ended: list[Arrays] = []
        """The factors that ended the last periods."""
        self._held: dict[int, int] = {}
        """By client, the period whose weights it surely holds, if not 0."""

    @classmethod
    def of(cls, model: nn.Module, interval: int, threads: int = 1) -> "BaseModel | None":
        """That of a model; None where it has no updates."""
        updates = Updates.of(model, interval)
        return None if updates is None else cls(updates, threads)

    @property
    def period(self) -> int:
        return self.updates.period(self.finished)

    def add_to(self, messages: Sequence[Message]) -> None:
        """Give each message what its client misses."""
        news: dict[int, dict[str, flwr.app.ArrayRecord]] = {}
        for message in messages:
            held = self._held.get(client_of(message.metadata.dst_node_id), 0)
            if held not in news:
                news[held] = self._news(held)
            config = ConfigRecord({**message.content.config_records["config"], HELD: held})
            message.content = RecordDict({**message.content, **news[held], "config": config})

    def _news(self, held: int) -> dict[str, flwr.app.ArrayRecord]:
        # The last period's are the message's own arrays, as long as no round of the next has been.
        missed = self.period - held - self.updates.begins(self.finished)
        if missed <= 0:
            return {}
        newest = len(self._ended) - self.updates.begins(self.finished)
        if missed > newest or missed * self._factors_size >= self._weights_size:
            return {DENSE: wrap(self.weights)}
        sets = self._ended[newest - missed : newest]
        return {MISSED: wrap({name: np.stack([factors[name] for factors in sets]) for name in sets[0]})}

    @property
    def _factors_size(self) -> int:
        return sum(update.form.size for update in self.updates.by_weight.values())

    @property
    def _weights_size(self) -> int:
        return sum(weight.size for weight in self.weights.values())

    def confirm(self, messages: Iterable[Message], answered: Iterable[int]) -> None:
        """The nodes that answered hold the weights of this period; of the others nothing is known any more."""
        nodes = set(answered)
        for message in messages:
            node = message.metadata.dst_node_id
            if node in nodes:
                self._held[client_of(node)] = self.period
            else:
                self._held.pop(client_of(node), None)

    def unmoved(self, arrays: Arrays) -> Arrays:
        """What a round in which nobody trained makes of the arrays that it began with."""
        if not self.updates.begins(self.finished):
            return arrays
        # Those are merged already: the round began with factors that compose to nothing.
        start = self.updates.start(self.period)
        return {**arrays, **{name: start[name].numpy() for name in self.updates.names}}

    def follow(self, arrays: Arrays, *, merge: bool = True) -> None:
        """A round has ended and left these arrays.

        merge: false where nobody will look at the weights' numbers.
        """
        if self.updates.begins(self.finished + 1):
            if merge:
                self.weights = self._merged(arrays)
            self._ended.append({name: arrays[name].copy() for name in self.updates.names})
            del self._ended[: -(self._weights_size // self._factors_size) - 1]
        self.finished += 1

    def whole(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """The model that the last round left with everything merged, and u and v zero."""
        weights = self.weights if self.updates.begins(self.finished) else self._merged(arrays)
        return {**arrays, **weights, **{name: np.zeros_like(arrays[name]) for name in self.updates.names}}

    def _merged(self, arrays: Arrays) -> dict[str, np.ndarray]:
        with torch_threads(self._threads):
            return self.updates.merged(self.weights, arrays, self.period)

    def state(self) -> dict[str, np.ndarray]:
        """Arrays for a checkpoint."""
        ended = {f"ended-{n}/{name}": a for n, factors in enumerate(self._ended) for name, a in factors.items()}
        held = np.array(sorted(self._held.items()), np.int64).reshape(-1, 2)
        weights = {f"weights/{name}": weight for name, weight in self.weights.items()}
        return {**weights, **ended, "finished": np.array(self.finished), "held": held}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on where `state` was taken."""
        self.weights = {name: state[f"weights/{name}"] for name in self.weights}
        count = sum(path.endswith(f"/{self.updates.names[0]}") for path in state)
        self._ended = [{name: state[f"ended-{n}/{name}"] for name in self.updates.names} for n in range(count)]
        self.finished, self._held = int(state["finished"]), dict(state["held"].tolist())
