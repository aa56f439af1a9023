"""The model a process keeps, which becomes any of its clients in turn."""

from collections.abc import Mapping, Sequence

import torch
from flwr.app import Message, MessageType
from flwr.clientapp import ClientApp
from torch import nn

from lowrank_fl.data.examples import Examples, Parts
from lowrank_fl.execution.make import make_trainer
from lowrank_fl.flower.client import make_client_app
from lowrank_fl.flower.failure import failed
from lowrank_fl.flower.grid import client_of, make_context
from lowrank_fl.flower.records import ArrayRecord, to_arrays, to_record
from lowrank_fl.training import LocalTraining


class Resident:
    """The model a process keeps, behind its ClientApp."""

    def __init__(self, model: nn.Module, examples: Examples, parts: Parts, how: LocalTraining) -> None:
        self.trainer = make_trainer(model, examples, parts, how)
        self.app: ClientApp = make_client_app(self.trainer, self._reply)
        self._slot: int | None = None
        self._evaluated: torch.Tensor | None = None

    def run_group(self, messages: Sequence[Message], slots: Sequence[int | None]) -> list[Message]:
        """The replies of a group of clients, which may train together."""
        training = [message for message in messages if message.metadata.message_type == MessageType.TRAIN]
        self.trainer.expect([client_of(message.metadata.dst_node_id) for message in training])
        return [self.run(message, slot) for message, slot in zip(messages, slots, strict=True)]

    def run(self, message: Message, slot: int | None) -> Message:
        self._evaluated, self._slot = None, slot
        client = client_of(message.metadata.dst_node_id)
        try:
            return self.app(message, make_context(client, len(self.trainer.parts)))
        except Exception as error:  # a full disk, no memory: whatever it is, it is one client's
            return failed(message, error)

    def _reply(self, state: Mapping[str, torch.Tensor]) -> ArrayRecord:
        return to_record(state, shared=False, slot=self._slot)

    def evaluate(self, record: ArrayRecord, start: int) -> tuple[int, float]:
        # The slices of one model come one after the other; it is loaded for the first of them.
        if self._evaluated is None or self._evaluated.data_ptr() != record.block.data_ptr():
            self.trainer.load(to_arrays(record))
            self._evaluated = record.block  # held, so that no other model can come to lie at its address
        return self.trainer.evaluate(start)
