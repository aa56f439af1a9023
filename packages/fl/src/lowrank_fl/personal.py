"""What each client has of a model to itself: where it comes from, how it trains, where it stays. Torch alone."""

from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor

from lowrank_fl.client_state import ClientStates
from lowrank_fl.drift import Drift
from lowrank_fl.training import Trained, Trainer

Arrays = Mapping[str, np.ndarray]


class Personal:
    """Puts a client's own part beside what it received, and trains the two as `trainer.how.personalization` says.

    Make it before the trainer's model is trained or overwritten: a client that has no part of its own yet starts from
    the values which that model has now, as all clients do.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.how = trainer, trainer.how.personalization
        own = trainer.state if self.how.kind == "ditto" else trainer.local
        self._start = {name: trainer.state[name].clone() for name in own}
        self._states = ClientStates(trainer.how.folder("personal")) if own else None

    def begin(self, received: Arrays, client: int, round_number: int, lr: float, state_round: int) -> None:
        """Leave in the trainer what a round's training starts from, after what comes before it.

        The client's own part is that of `state_round`, the last round whose reply the server used; 0 is the start.


        Ditto's own model trains first, so that the shared one is left as FedAvg would leave it; FedRep's last layer
        trains first, as in its Algorithm 1.
        """
        trainer, how = self.trainer, self.how
        self._load(received, client, state_round)
        if how.kind == "ditto":
            shared = {name: torch.as_tensor(value).to(trainer.device) for name, value in received.items()}
            drift = Drift(proximal=how.mu, received=shared)
            trainer.train(client, round_number, lr, drift, epochs=how.epochs, stream="personal")
            self._keep(client, round_number, trainer.state, state_round)
            trainer.load(received)
        elif how.kind == "fedrep":
            trainer.train(client, round_number, lr, only=trainer.local, epochs=how.epochs, stream="personal")

    def train(
        self,
        client: int,
        round_number: int,
        lr: float,
        drift: Drift | None,
        state_round: int,
        only: Collection[str] | None = None,
    ) -> Trained:
        """Train what `begin` left; afterwards `trainer.shared` is what goes back, and the client's own part is kept.

        only: the names of what may change; everything that this kind trains here if not given.
        """
        trainer = self.trainer
        if only is None and self.how.kind == "fedrep":
            only = trainer.shared
        trained = trainer.train(client, round_number, lr, drift, only=only)
        if trainer.local:
            own = {name: trainer.state[name] for name in trainer.local}
            self._keep(client, round_number, own, state_round)
        return trained

    def begin_test(self, received: Arrays, client: int, round_number: int, lr: float, state_round: int) -> None:
        """Leave in the trainer the model that the client would use after this round."""
        self._load(received, client, state_round)
        if self.how.test_epochs:
            self.trainer.train(client, round_number, lr, epochs=self.how.test_epochs, stream="test")

    def _load(self, received: Arrays, client: int, state_round: int) -> None:
        """What was received, and over it the client's own part as `state_round` left it."""
        assert received.keys() == self.trainer.shared.keys(), "another model than this client's was sent"
        self.trainer.load(received)
        kept = self._states.load(client, state_round) if self._states else {}
        self.trainer.load(kept or self._start)

    def _keep(self, client: int, round_number: int, tensors: Mapping[str, Tensor], state_round: int) -> None:
        assert self._states is not None
        self._states.save(client, round_number, tensors, keep=state_round)
