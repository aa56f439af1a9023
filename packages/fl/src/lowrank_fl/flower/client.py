"""The clients as a Flower ClientApp: the same one for every engine."""

from collections.abc import Callable, Mapping

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from lowrank_fl.flower.records import ArrayRecord, to_arrays
from lowrank_fl.training import Trainer


def make_client_app(trainer: Trainer, reply: Callable[[Mapping[str, Tensor]], ArrayRecord]) -> ClientApp:
    """A ClientApp that trains with `trainer`, as the client that `partition-id` of the node's config names.

    A training message carries one ArrayRecord, the model, and a ConfigRecord `config` with `server-round`, `lr`
    and, under FedProx, `proximal-mu`. The reply carries the trained model as `arrays`, and as `metrics`
    the weight `num-examples` and the `loss`; `reply` makes the record of a trained model.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        content = message.content
        config = content.config_records["config"]
        trainer.load(to_arrays(next(iter(content.array_records.values()))))
        examples, loss = trainer.train(
            client=int(context.node_config["partition-id"]),
            round_number=_integer(config["server-round"]),
            lr=_number(config["lr"]),
            proximal_mu=_number(config.get("proximal-mu", 0.0)),
        )
        metrics = MetricRecord({"num-examples": examples, "loss": loss})
        return Message(RecordDict({"arrays": reply(trainer.state), "metrics": metrics}), reply_to=message)

    return app


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)


def _integer(value: object) -> int:
    assert isinstance(value, int)
    return value
