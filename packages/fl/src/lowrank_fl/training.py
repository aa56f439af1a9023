"""What a client does with a model, and how a model is tested: torch alone, no Flower."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_core import LowrankError
from lowrank_fl.config import (
    AttackConfig,
    CodecConfig,
    Execution,
    FederationConfig,
    PrivacyConfig,
    UpdateConfig,
)
from lowrank_fl.data.examples import Examples, Parts
from lowrank_fl.data.placement import on_device
from lowrank_fl.drift import Drift
from lowrank_fl.ranks.layers import fit
from lowrank_fl.ranks.training import RankTraining
from lowrank_fl.seeds import Purpose, derive_seed
from lowrank_fl.state import SHARED, Personalization, local_names, state_of, trained_state
from lowrank_fl.steps import SGD, backward, correction, in_precision, training_only

# Evaluation always runs over the same slices, so that who evaluates them changes no sum.
EVALUATION_BATCH = 500


@dataclass(frozen=True)
class LocalTraining:
    """How every client trains; picklable, so that worker processes can be given it whole."""

    federation: FederationConfig
    jacobian_lambda: float
    seed: int
    device: str
    threads: int
    state_folder: Path | None = None
    """Where clients keep what they know from earlier rounds: their own part of a model, a strategy's variates."""
    personalization: Personalization = SHARED
    codec: CodecConfig = field(default_factory=CodecConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    execution: Execution = "sequential"
    """How a process trains the clients it is given (`make_trainer`); never `auto`, which is settled before."""
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)

    @property
    def group_size(self) -> int:
        """How many clients a process is given at once, at the most."""
        if self.execution != "batched":
            return 1
        # More would fall out of a CPU's caches; a GPU has memory for them.
        return 8 if torch.device(self.device).type == "cpu" else 64

    def folder(self, name: str) -> Path:
        """The folder of that name for what clients keep."""
        if self.state_folder is None:
            raise LowrankError("these clients keep something between rounds; give them a folder for it (state_folder)")
        return self.state_folder / name


@dataclass(frozen=True)
class Tested:
    """How a model answered one client's held-out examples."""

    examples: int
    accuracy: float
    loss: float
    """Mean cross-entropy."""


@dataclass(frozen=True)
class Trained:
    """What one client's training came to."""

    examples: int
    loss: float
    """Mean of the last epoch."""
    steps: int
    importance: Tensor | None = None
    """Of AdaLoRA's directions, layer after layer; None without AdaLoRA."""


class Trainer:
    """One resident model that becomes any client in turn: its tensors are overwritten, never reallocated."""

    def __init__(self, model: nn.Module, examples: Examples, parts: Parts, how: LocalTraining) -> None:
        self.how = how
        self.device = torch.device(how.device)
        self.model = model.to(self.device)
        if not examples.is_text:
            for parameter in self.model.parameters():
                if parameter.dim() == 4:  # Module.to would refuse the factors of a Kronecker kernel, which have five
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.state = trained_state(self.model)
        self._tensors = state_of(self.model)
        self.local = local_names(self.model, how.personalization)
        self.ranks = RankTraining.of(self.model)
        self.examples = on_device(examples, self.device)
        self.parts = parts

    @property
    def shared(self) -> dict[str, Tensor]:
        """What travels of the resident model."""
        return {name: tensor for name, tensor in self.state.items() if name not in self.local}

    def load(self, tensors: Mapping[str, np.ndarray] | Mapping[str, Tensor]) -> None:
        """Copy a model, or a part of one, into the resident one; what is frozen too, where it comes.

        It takes AdaLoRA's ranks from there.
        """
        if fit(self.model, tensors):
            self.state, self._tensors = trained_state(self.model), state_of(self.model)
        with torch.no_grad():
            for name, tensor in tensors.items():
                self._tensors[name].copy_(torch.as_tensor(tensor))

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes and that travel, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad and name not in self.local}

    def expect(self, clients: Sequence[int]) -> None:
        """Be told which clients train next, for a trainer that takes several at once."""

    def backward(self, inputs: Tensor, labels: Tensor, lr: float) -> Tensor:
        """One batch's gradients, and its loss alone; the tensor may be written to at the next call."""
        return backward(self.model, inputs, labels, lr, self.how.jacobian_lambda, self.how.federation.precision)

    def check_loss(self, loss: float, client: int, round_number: int) -> None:
        """Raise LowrankError where a client's loss is no longer a number."""
        if not math.isfinite(loss):
            federation = self.how.federation
            raise LowrankError(
                f"training diverged: client {client} has loss {loss} in round {round_number}; "
                f"lower federation.lr (now {federation.lr:g})"
            )

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
        """Train the loaded model on one client's examples by SGD.

        Everything random comes from (seed, stream, round, client). A drift corrects what travels alone.

        only: the names of what may change; everything if not given.
        epochs: `federation.epochs` if not given.

        Raises:
            LowrankError: the loss is no longer a number.
        """
        self._seed(derive_seed(self.how.seed, stream, round_number, client))
        with training_only(self.model, only):
            return self._train(client, round_number, lr, drift, epochs or self.how.federation.epochs)

    def _train(self, client: int, round_number: int, lr: float, drift: Drift | None, epochs: int) -> Trained:
        federation = self.how.federation
        rows = torch.from_numpy(self.parts.train[client]).to(self.examples.inputs.device)
        inputs = self._prepare(self.examples.inputs[rows])
        labels = self.examples.labels[rows].to(self.device)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        correct = correction(self.trainable(), drift) if drift else None
        sgd = SGD(parameters, lr, federation.momentum, federation.weight_decay)
        self.model.train()
        self.model.zero_grad()
        total = torch.zeros((), device=self.device)
        steps = 0
        if self.ranks:
            self.ranks.begin()
        for _ in range(epochs):
            total.zero_()
            order = torch.randperm(len(labels)).to(self.device)
            for batch in order.split(federation.batch_size):
                total += len(batch) * self.backward(inputs[batch], labels[batch], lr)
                if correct:
                    correct()
                if self.ranks:
                    self.ranks.before_step()
                steps += 1
                sgd.step()
                if self.ranks:
                    self.ranks.after_step()
        loss = total.item() / len(labels)
        self.check_loss(loss, client, round_number)
        return Trained(len(labels), loss, steps, self.ranks.scores() if self.ranks else None)

    def evaluate(self, start: int) -> tuple[int, float]:
        """Correct answers and summed loss of the loaded model on one slice of the server's test set."""
        stop = start + EVALUATION_BATCH
        return self._answer(self.examples.test_inputs[start:stop], self.examples.test_labels[start:stop])

    def test(self, client: int) -> Tested:
        """How the loaded model answers the examples that a client holds out."""
        rows = torch.from_numpy(self.parts.held_out[client]).to(self.examples.inputs.device)
        answers = [
            self._answer(self.examples.inputs[part], self.examples.labels[part])
            for part in rows.split(EVALUATION_BATCH)
        ]
        count = len(rows)
        return Tested(count, sum(right for right, _ in answers) / count, sum(loss for _, loss in answers) / count)

    @torch.inference_mode()
    def _answer(self, inputs: Tensor, labels: Tensor) -> tuple[int, float]:
        self.model.eval()
        labels = labels.to(self.device)
        with in_precision(self.how.federation.precision, self.device):
            logits = self.model(self._prepare(inputs))
            loss = F.cross_entropy(logits, labels, reduction="sum").item()
        return int((logits.argmax(1) == labels).sum()), loss

    def _seed(self, seed: int) -> None:
        # torch.manual_seed also tells every accelerator torch was built for, a millisecond for each client.
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def _prepare(self, inputs: Tensor) -> Tensor:
        """Stored examples as the model reads them; pictures channels last, which can halve a convolution's time."""
        ready = self.examples.normalize(inputs.to(self.device))
        return ready if self.examples.is_text else ready.contiguous(memory_format=torch.channels_last)
