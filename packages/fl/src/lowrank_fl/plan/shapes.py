"""What a plan must know of a data set, for the usual ones without reading them."""

import dataclasses
from dataclasses import dataclass

from lowrank_fl.clients import examples_of
from lowrank_fl.config import RunConfig


@dataclass(frozen=True)
class DataShape:
    """What a plan must know of a data set: an example's shape, how many classes, training and test examples."""

    input_shape: tuple[int, ...]
    classes: int
    examples: int
    test_examples: int
    makers: int | None = None
    """Who made the training examples, where that is known; a natural partition leaves out all but one a client."""


# So that a plan needs no download, or no file of one's own; the tests hold these against the loaders.
SHAPES = {
    "digits": DataShape((1, 8, 8), 10, 1442, 355),
    "cifar10": DataShape((3, 32, 32), 10, 50_000, 10_000),
    "cifar100": DataShape((3, 32, 32), 100, 50_000, 10_000),
    "cinic10": DataShape((3, 32, 32), 10, 90_000, 90_000),
    "mnist": DataShape((1, 28, 28), 10, 60_000, 10_000),
    "emnist": DataShape((1, 28, 28), 62, 697_932, 116_323),
    # flwrlabs/femnist, which has no test split.
    "femnist": DataShape((1, 28, 28), 62, 814_277, 0, makers=3_597),
    # All plays by speaking role, public domain; another edition has about as many.
    "shakespeare": DataShape((80,), 80, 659_471, 155_023, makers=850),
}


def data_shape(config: RunConfig) -> DataShape:
    """Of the examples that the run's clients and its server hold."""
    data = config.data
    known = SHAPES.get(data.name)
    # A text is read faster than it is trained on for a second, and nobody's is quite like ours. Of how many examples
    # a class has, only the data can tell.
    if known is None or data.classes is not None or (data.name == "shakespeare" and data.path is not None):
        examples = examples_of(config)
        makers = None if examples.groups is None else len(set(examples.groups))
        shape, classes = examples.input_shape, len(examples.classes)
        known = DataShape(shape, classes, len(examples.labels), len(examples.test_labels), makers)
    held = min(known.examples, data.max_examples or known.examples)
    if config.partition.kind == "natural" and known.makers is not None:
        held = held * config.federation.clients // known.makers
    tested = min(known.test_examples, data.max_test_examples or known.test_examples)
    return dataclasses.replace(known, examples=held, test_examples=tested)


def trained_examples(config: RunConfig, data: DataShape) -> float:
    """That a client trains on, on average."""
    share = (1 - config.partition.held_out) * config.partition.train_share
    return share * data.examples / config.federation.clients
