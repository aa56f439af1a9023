"""The clients as a Flower ClientApp: the same one for every engine."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from lowrank_fl.aggregation import trained_in_turn
from lowrank_fl.attack import poisoned_clients, poisoned_update
from lowrank_fl.client_state import ClientStates
from lowrank_fl.drift import Drift, feddyn_drift, feddyn_gradient, scaffold_control, scaffold_drift
from lowrank_fl.flower.codecs import codec_mod
from lowrank_fl.flower.held_weights import HeldWeights
from lowrank_fl.flower.importance import IMPORTANCE, SCORES
from lowrank_fl.flower.instructions import Instructions
from lowrank_fl.flower.records import ArrayRecord, to_arrays, to_record
from lowrank_fl.flower.strategies.private import clipping_mods
from lowrank_fl.personal import Personal
from lowrank_fl.seeds import derive_seed
from lowrank_fl.training import Trainer


def make_client_app(trainer: Trainer, reply: Callable[[Mapping[str, Tensor]], ArrayRecord]) -> ClientApp:
    """A ClientApp that trains and tests with `trainer`, as the client that the message names.

    A training message carries what is shared of the model as `arrays`, and a ConfigRecord `config` with the number of
    the `client` (the node's `partition-id` if not given, because a node may host one client or several),
    `server-round`, the `state-round` that left what the client goes on from, `lr` and, under FedProx, `proximal-mu`,
    under FedDyn `feddyn-alpha`, and where one factor of each weight is trained, its `factor-turn`; SCAFFOLD adds the
    server's control variate as `control`, and with updates there is what the client's weights miss
    (`flower/base_model.py`). The reply carries the trained `arrays`, in a turn no others, under SCAFFOLD
    the change of the client's control variate as `control`, with AdaLoRA the array record `importance`, and as
    `metrics` the weight `num-examples` and the `loss`; `reply` makes the record of the trained arrays.

    An evaluation message carries `arrays`, `client`, `server-round`, `state-round` and `lr` likewise; the reply's
    `metrics` are `num-examples`, `accuracy` and `loss` on what the client holds out.
    """
    how = trainer.how
    encoded = not how.codec.up == how.codec.down == "none"
    app = ClientApp(mods=[codec_mod(how.codec, how.seed, how.state_folder)] if encoded else [])
    personal, weights = Personal(trainer), HeldWeights(trainer)
    poisoned = poisoned_clients(how.attack, len(trainer.parts), how.seed)

    @app.train(mods=clipping_mods(how.privacy))
    def train(message: Message, context: Context) -> Message:
        arrays = message.content.array_records
        told = Instructions.of(message, context)
        lr = told.number("lr")
        received = weights.received(message.content, told, told.round - 1)
        personal.begin(received, told.client, told.round, lr, told.state_round)
        rule = _Rule(trainer, told, arrays)
        only = None if told.turn is None else trained_in_turn(trainer.model, told.turn)
        trained = personal.train(told.client, told.round, lr, rule.drift, told.state_round, only)
        sent = {name: tensor for name, tensor in trainer.shared.items() if only is None or name in only}
        if told.client in poisoned:
            seed = derive_seed(how.seed, "attack", told.round, told.client)
            sent = poisoned_update(how.attack, received, sent, trainer.trainable(), seed)
        content = RecordDict({"arrays": reply(sent)})
        if rule.keeps_state:
            change = rule.finish(trained.steps, lr)
            if change is not None:
                content["control"] = to_record(change, shared=False)
        if trained.importance is not None:
            content[IMPORTANCE] = to_record({SCORES: trained.importance}, shared=False)
        content["metrics"] = MetricRecord({"num-examples": trained.examples, "loss": trained.loss})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        told = Instructions.of(message, context)
        received = weights.received(message.content, told, told.round)
        personal.begin_test(received, told.client, told.round, told.number("lr"), told.state_round)
        tested = trainer.test(told.client)
        metrics = {"num-examples": tested.examples, "accuracy": tested.accuracy, "loss": tested.loss}
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)

    return app


class _Rule:
    """What the strategy asks of this client in this round, beyond plain training."""

    def __init__(self, trainer: Trainer, told: Instructions, arrays: Any) -> None:
        self.trainer, self.told = trainer, told
        self.alpha = told.number("feddyn-alpha", 0.0)
        self.control: dict[str, Tensor] | None = None
        if "control" in arrays:
            received = to_arrays(arrays["control"])
            self.control = {name: torch.from_numpy(value).to(trainer.device) for name, value in received.items()}
        self.keeps_state = self.control is not None or bool(self.alpha)
        mu = told.number("proximal-mu", 0.0)
        self.drift = Drift(proximal=mu) if mu else None
        if not self.keeps_state:
            return
        self.states = ClientStates(trainer.how.folder("strategy"))
        kept = self.states.load(told.client, told.state_round)
        self.own = {name: tensor.to(trainer.device) for name, tensor in kept.items()}
        self.received = {name: p.detach().clone() for name, p in trainer.trainable().items()}
        if self.control is not None:
            self.drift = scaffold_drift(self.control, self.own)
        else:
            self.drift = feddyn_drift(self.own, self.alpha)

    def finish(self, steps: int, lr: float) -> dict[str, Tensor] | None:
        """Keep the client's new state; for SCAFFOLD, the change of its control variate, which travels."""
        trained = self.trainer.trainable()
        if self.control is None:
            self._keep(feddyn_gradient(self.own, self.received, trained, self.alpha))
            return None
        new = scaffold_control(self.control, self.own, self.received, trained, steps, lr)
        self._keep(new)
        return {name: value - self.own.get(name, 0.0) for name, value in new.items()}

    def _keep(self, tensors: Mapping[str, Tensor]) -> None:
        self.states.save(self.told.client, self.told.round, tensors, keep=self.told.state_round)
