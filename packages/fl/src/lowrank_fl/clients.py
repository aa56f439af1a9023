"""A run's examples, who holds them, its model and how it is trained, from the configuration alone."""

import math
from pathlib import Path

import numpy as np
from torch import nn

from lowrank_core import FactorizeReport, LowrankError
from lowrank_fl.config import RunConfig
from lowrank_fl.data import load_examples, partition_examples
from lowrank_fl.data.examples import Examples, Parts
from lowrank_fl.data.rows import kept_rows, of_classes
from lowrank_fl.models.adapted import put_adapter
from lowrank_fl.models.build import build_model
from lowrank_fl.saved_model import start_from
from lowrank_fl.seeds import derive_seed
from lowrank_fl.state import personalization_of
from lowrank_fl.training import LocalTraining


def examples_of(config: RunConfig) -> Examples:
    """The data set that `config` names, whole; raises LowrankError where it cannot be had."""
    seed, data = derive_seed(config.seed, "data"), config.data
    if data.classes is None:
        examples = load_examples(data, config.partition, seed)
    else:
        whole = load_examples(data.model_copy(update={"max_examples": None}), config.partition, seed)
        examples = of_classes(whole, data.classes)
        examples = examples.chosen(kept_rows(len(examples.labels), data.max_examples, seed), None)
    return examples.chosen(None, kept_rows(len(examples.test_labels), data.max_test_examples, seed))


def parts_of(config: RunConfig, examples: Examples) -> Parts:
    """Each client's rows of the training examples; raises LowrankError where a client would hold none."""
    seed = derive_seed(config.seed, "partition")
    rows = partition_examples(examples, config.partition, config.federation.clients, seed)
    train: list[np.ndarray] = []
    held_out: list[np.ndarray] = []
    for client, held in enumerate(rows):
        drawn = np.random.default_rng(derive_seed(config.seed, "held_out", client)).permutation(held)
        tested = math.ceil(config.partition.held_out * len(held))
        trained = math.ceil(config.partition.train_share * (len(held) - tested))
        if not trained:
            raise LowrankError(
                f"client {client} holds {len(held)} examples and would train on none of them beside the {tested} it "
                "tests on; set fewer federation.clients or a smaller partition.held_out"
            )
        held_out.append(np.sort(drawn[:tested]))
        train.append(np.sort(drawn[tested : tested + trained]))
    return Parts(train, held_out)


def model_of(config: RunConfig, examples: Examples) -> tuple[nn.Module, FactorizeReport | None]:
    """The model every client starts from, and what of it was factorized or has an adapter (None for `original`).

    Raises:
        LowrankError: it does not read such examples, `model.start` does not fit it, or `adapter.target` means nothing.
    """
    seed = derive_seed(config.seed, "model")
    model, report = build_model(config.model, examples.input_shape, len(examples.classes), seed=seed)
    if config.model.start is not None:
        start_from(model, config.model.name, Path(config.model.start))
    if config.adapter.method is not None:
        seed = derive_seed(config.seed, "adapter")
        report = put_adapter(model, config.model.name, config.adapter, seed=seed)
    return model, report


def training_of(config: RunConfig, folder: Path) -> LocalTraining:
    """How the run's clients train; what they know from earlier rounds lies in `folder`."""
    return LocalTraining(
        config.federation,
        config.model.jacobian_lambda,
        config.seed,
        config.device,
        config.engine.threads,
        folder,
        personalization_of(config),
        config.codec,
    )
