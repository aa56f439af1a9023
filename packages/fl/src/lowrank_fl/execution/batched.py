"""Several clients at once: their parameters stacked, so that one step of all of them is one batched product a layer."""

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from lowrank_fl.data.examples import Examples, Parts
from lowrank_fl.drift import Drift
from lowrank_fl.execution.stacking import Named, as_function, check_stackable, stack
from lowrank_fl.seeds import Purpose, derive_seed
from lowrank_fl.steps import SGD, correction, in_precision, training_only
from lowrank_fl.training import LocalTraining, Trained, Trainer


class BatchedTrainer(Trainer):
    """Trains the clients of a group together as soon as the first of them is asked for, and hands out what came of it.

    That takes clients which start from the same model. It is looked at for each: a client that starts from another, or
    that is trained otherwise than the first, is trained alone.
    """

    def __init__(self, model: nn.Module, examples: Examples, parts: Parts, how: LocalTraining) -> None:
        check_stackable(model)
        super().__init__(model, examples, parts, how)
        self._function = as_function(self.model)
        self.expect(())

    def expect(self, clients: Sequence[int]) -> None:
        self._group = tuple(clients)
        self._asked: object = None
        self._start: Named = {}
        self._outcomes: dict[int, tuple[Named, Trained]] = {}

    def train(
        self,
        client: int,
        round_number: int,
        lr: float,
        drift: Drift | None = None,
        *,
        only: Collection[str] | None = None,
        epochs: int | None = None,
        stream: Purpose = "client",
    ) -> Trained:
        alike = drift is None or (not drift.offsets and drift.received is None)
        asked = (round_number, lr, drift and drift.proximal, None if only is None else frozenset(only), epochs, stream)
        if alike and client in self._group and not self._outcomes:
            self._asked = asked
            self._start = {name: tensor.clone() for name, tensor in self.state.items()}
            with training_only(self.model, only):
                self._train_group(round_number, lr, drift, epochs or self.how.federation.epochs, stream)
        if not (alike and client in self._outcomes and asked == self._asked and self._is_start()):
            return super().train(client, round_number, lr, drift, only=only, epochs=epochs, stream=stream)
        tensors, trained = self._outcomes[client]
        self.check_loss(trained.loss, client, round_number)
        self.load(tensors)
        return trained

    def _is_start(self) -> bool:
        return all(torch.equal(tensor, self._start[name]) for name, tensor in self.state.items())

    def _train_group(self, round_number: int, lr: float, drift: Drift | None, epochs: int, stream: Purpose) -> None:
        federation, held = self.how.federation, self.parts.train
        # Those with the most steps first, so that the clients which still train are always the first ones.
        clients = sorted(self._group, key=lambda client: -len(held[client]))
        rows = torch.cat([torch.from_numpy(held[client]) for client in clients]).to(self.examples.inputs.device)
        inputs = self._prepare(self.examples.inputs[rows])
        labels = self.examples.labels[rows].to(self.device)
        width = min(federation.batch_size, len(held[clients[0]]))
        schedules: list[Schedule] = []
        for client in clients:
            self._seed(derive_seed(self.how.seed, stream, round_number, client))
            schedules.append(schedule(len(held[client]), epochs, federation.batch_size, width))
        offsets = itertools.accumulate((len(held[client]) for client in clients[:-1]), initial=0)
        plan = side_by_side(schedules, list(offsets), self.device)

        trained: Named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        fixed = {name: tensor.detach() for name, tensor in self.model.state_dict().items() if name not in trained}
        stacked = stack(trained, len(clients))
        received = drift and replace(drift, received=self._start)
        shared = self.trainable().keys()
        sgd = SGD([], lr, federation.momentum, federation.weight_decay)

        def loss_of(parameters: Named, inputs: Tensor, labels: Tensor, taken: Tensor, size: Tensor) -> Tensor:
            with in_precision(federation.precision, self.device):
                each = F.cross_entropy(self._function((parameters, fixed), inputs), labels, reduction="none")
            return (each * taken).sum() / size

        totals = torch.zeros(len(clients), device=self.device)
        steps = [len(one.rows) for one in schedules]
        for active, span in itertools.groupby(range(steps[0]), lambda step: sum(step < count for count in steps)):
            leaves = {name: tensor[:active].requires_grad_() for name, tensor in stacked.items()}
            sgd.parameters = list(leaves.values())
            sgd.velocities = [velocity[:active] for velocity in sgd.velocities]
            correct = correction({n: leaf for n, leaf in leaves.items() if n in shared}, received) if received else None
            for step in span:
                rows, taken, sizes, reported = plan.at(step, active)
                losses = vmap(loss_of)(leaves, inputs[rows], labels[rows], taken, sizes)
                # No parameter is in two clients' losses, so the sum's gradient is each client's own.
                losses.sum().backward()
                totals[:active] += reported * sizes * losses.detach()
                if correct:
                    correct()
                sgd.step()
        for number, (client, total) in enumerate(zip(clients, totals.tolist(), strict=True)):
            count = len(held[client])
            tensors = {name: tensor[number].detach() for name, tensor in stacked.items()}
            self._outcomes[client] = tensors, Trained(count, total / count, steps[number])


@dataclass(frozen=True)
class Schedule:
    """Which examples each step takes; of several clients there is a dimension of clients after that of steps."""

    rows: Tensor
    """int64, `(steps, width)`; a place in the batch that no example takes points to row 0."""
    taken: Tensor
    """bool, `(steps, width)`: the places that examples take."""
    sizes: Tensor
    """`(steps,)`: how many these are."""
    reported: Tensor
    """bool, `(steps,)`: the last epoch's, whose loss is reported."""

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.rows, self.taken, self.sizes, self.reported

    def at(self, step: int, clients: int) -> tuple[Tensor, ...]:
        """One step of the first so many clients."""
        return tuple(tensor[step, :clients] for tensor in self.tensors())


def schedule(count: int, epochs: int, batch_size: int, width: int) -> Schedule:
    """One client's steps over `count` examples, drawn as `Trainer.train` draws them."""
    batches = math.ceil(count / batch_size)
    filled = torch.zeros(batches * batch_size, dtype=torch.bool)
    filled[:count] = True
    filled = filled.view(batches, batch_size)[:, :width]
    rows: list[Tensor] = []
    for _ in range(epochs):
        order = torch.zeros(batches, width, dtype=torch.int64)
        order[filled] = torch.randperm(count)
        rows.append(order)
    taken = filled.repeat(epochs, 1)
    return Schedule(torch.cat(rows), taken, taken.sum(1).float(), torch.arange(len(taken)) >= (epochs - 1) * batches)


def side_by_side(schedules: Sequence[Schedule], offsets: Sequence[int], device: torch.device) -> Schedule:
    """One schedule of all clients.

    offsets: the row at which each client's examples begin.
    """
    moved = [replace(one, rows=one.rows + offset) for one, offset in zip(schedules, offsets, strict=True)]
    # The clients that take fewer steps are padded, and left out before.
    parts = zip(*(one.tensors() for one in moved), strict=True)
    joined = [nn.utils.rnn.pad_sequence(list(tensors)) for tensors in parts]
    return Schedule(*(tensor.to(device) for tensor in joined))
