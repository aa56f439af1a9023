"""The weights under updates as a client holds them."""

from collections.abc import Mapping

import flwr.app
import torch
from flwr.app import RecordDict

from lowrank_core import LowrankError
from lowrank_fl.client_state import ClientStates
from lowrank_fl.flower.base_model import DENSE, HELD, MISSED
from lowrank_fl.flower.instructions import Instructions
from lowrank_fl.flower.records import to_arrays
from lowrank_fl.packing import Arrays
from lowrank_fl.training import Trainer
from lowrank_fl.updates.periods import Updates


class HeldWeights:
    """Each client's weights under the updates, on disk by period, and what brings them up to date.

    Make it before the trainer's model is trained or overwritten: its weights now are those of period 0.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._model = trainer.model
        self._updates = Updates.of(trainer.model, trainer.how.update.interval)
        if self._updates:
            self._start = {name: weight.cpu().numpy().copy() for name, weight in self._updates.weights.items()}
            self._states = ClientStates(trainer.how.folder("weights"))

    def received(self, content: RecordDict, told: Instructions, finished: int) -> Arrays:
        """The arrays of a message as what the client goes on from, with its weights up to date in the trainer's model.

        Of a model without updates they are the arrays as they came.

        finished: rounds before the one that the message's model is for.

        Raises:
            LowrankError: the weights that the server counts on are gone, or what came does not lead from them to those
                of this period.
        """
        arrays, updates = to_arrays(content.array_records["arrays"]), self._updates
        if updates is None:
            return arrays
        period, held = updates.period(finished), int(told.number(HELD, 0))
        begins = updates.begins(finished)
        reached, weights = self._to_go_on_from(content.array_records, told.client, held, period)
        ended = _missed(content.array_records)
        if reached < period and begins:
            ended.append(arrays)
        if reached + len(ended) != period:
            raise LowrankError(
                f"the message brings the factors of {len(ended)} periods to a client that holds the weights of period "
                f"{held}, and the round is of period {period}; let a Wire with the run's BaseModel send it"
            )
        for number, factors in enumerate(ended, reached):
            weights = updates.merged(weights, factors, number)
        if period != held:
            self._keep(weights, told.client, period, held)
        start = updates.start(period)
        with torch.no_grad():
            for name, weight in updates.weights.items():
                weight.copy_(torch.from_numpy(weights[name]))
            for name, buffer in self._model.named_buffers():
                if name in start:
                    buffer.copy_(start[name])
        return {**arrays, **({name: start[name].numpy() for name in updates.names} if begins else {})}

    def _to_go_on_from(
        self, records: Mapping[str, flwr.app.ArrayRecord], client: int, held: int, period: int
    ) -> tuple[int, Arrays]:
        """A period and its weights: this one's if they came, else those that the client holds."""
        if DENSE in records:
            return period, to_arrays(records[DENSE])
        kept = self._states.load(client, held)
        return held, {name: value.numpy() for name, value in kept.items()} or self._start

    def _keep(self, weights: Arrays, client: int, period: int, held: int) -> None:
        # A resumed run may count on what the client held before it was forgotten.
        latest = max((number for number in self._states.rounds(client) if number < period), default=0)
        tensors = {name: torch.from_numpy(weight) for name, weight in weights.items()}
        self._states.save(client, period, tensors, keep=held or latest)


def _missed(records: Mapping[str, flwr.app.ArrayRecord]) -> list[Arrays]:
    """The factors that ended each period since, the oldest first."""
    if MISSED not in records:
        return []
    missed = to_arrays(records[MISSED])
    count = len(next(iter(missed.values())))
    return [{name: values[number] for name, values in missed.items()} for number in range(count)]
