"""The clients of a process that Flower starts: all they need is made there, from the run's configuration alone."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from lowrank_fl.flower.failure import failed

if TYPE_CHECKING:
    from lowrank_fl.flower.resident import Resident

Find = Callable[[Message, Context], "Resident"]


def make_remote_app(find: Find) -> ClientApp:
    """A ClientApp that answers with the resident model that `find` gives for a message.

    A `query` is answered with the node's `partition-id` and `num-partitions` as ConfigRecord `config`, before torch is
    imported: a SuperNode starts a process for each message.
    """
    app = ClientApp()

    @app.query()
    def describe(message: Message, context: Context) -> Message:
        config = ConfigRecord()
        for key in PART:
            if key in context.node_config:
                config[key] = context.node_config[key]
        return Message(RecordDict({"config": config}), reply_to=message)

    @app.train()
    @app.evaluate()
    def answer(message: Message, context: Context) -> Message:
        import torch

        try:
            resident = find(message, context)
            torch.set_num_threads(resident.trainer.how.threads)
            return resident.app(message, context)
        except Exception as error:
            return failed(message, error)

    return app


PART = ("partition-id", "num-partitions")
"""What a node's configuration says about the share of the clients that it hosts."""


@lru_cache(maxsize=1)
def resident_of(config: str, states: Path) -> "Resident":
    """The resident model of the run whose configuration is the JSON text `config`, kept until another is asked for.

    Raises:
        LowrankError: this machine lacks the data, or a part of it is empty.
    """
    from lowrank_fl.attack import with_poisoned_labels
    from lowrank_fl.clients import examples_of, model_of, parts_of, training_of
    from lowrank_fl.config import RunConfig
    from lowrank_fl.flower.resident import Resident

    settings = RunConfig.model_validate_json(config)
    examples = examples_of(settings)
    parts = parts_of(settings, examples)
    model, _ = model_of(settings, examples)
    examples = with_poisoned_labels(settings.attack, examples, parts, settings.seed)
    return Resident(model, examples, parts, training_of(settings, states))
