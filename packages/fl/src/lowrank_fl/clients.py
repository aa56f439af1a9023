"""A run's examples, who holds them, its model and how it is trained, from the configuration alone."""

import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
from torch import nn

from lowrank_core import FactorizeReport, LowrankError, UsageError
from lowrank_fl.config import NETWORKS, RunConfig
from lowrank_fl.data import load_examples, partition_examples
from lowrank_fl.data.examples import Examples, Parts
from lowrank_fl.data.rows import kept_rows, of_classes
from lowrank_fl.models.adapted import put_adapter
from lowrank_fl.models.build import build_model
from lowrank_fl.models.pretrained import TORCHVISION, pixel_statistics
from lowrank_fl.saved_model import start_from
from lowrank_fl.seeds import derive_seed
from lowrank_fl.state import personalization_of
from lowrank_fl.training import LocalTraining
from lowrank_fl.updates.layers import put_updates


def examples_of(config: RunConfig) -> Examples:
    """The data set that `config` names, whole; raises LowrankError where it cannot be had."""
    examples = _chosen(config)
    if config.model.name in NETWORKS or examples.is_text:
        return examples
    # As the network that others have trained saw pictures.
    channels, units = examples.input_shape[0], examples.white
    mean, std = (
        tuple(units * value for value in (values if channels == 3 else [fmean(values)] * channels))
        for values in pixel_statistics(config.model.name)
    )
    return replace(examples, mean=mean, std=std)


def _chosen(config: RunConfig) -> Examples:
    seed, data = derive_seed(config.seed, "data"), config.data
    if data.text_key is not None:
        if config.model.name in NETWORKS or config.model.name.startswith(TORCHVISION):
            raise UsageError(
                f"data.text_key is {data.text_key!r}, and model.name {config.model.name} does not read tokens; give a "
                "folder with a classifier of texts as transformers saves it"
            )
        data = data.model_copy(update={"tokenizer": data.tokenizer or config.model.name})
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
    """The model every client starts from, and what of it was factorized, or has an adapter or an update (None for
    `original`).

    Raises:
        LowrankError: it does not read such examples, `model.start` does not fit it, `adapter.target` means nothing, or
            no layer takes an update.
    """
    seed = derive_seed(config.seed, "model")
    model, report = build_model(config.model, examples.input_shape, len(examples.classes), seed=seed)
    if config.model.start is not None:
        start_from(model, config.model.name, Path(config.model.start))
    if config.adapter.method is not None:
        seed = derive_seed(config.seed, "adapter")
        report = put_adapter(model, config.model.name, config.adapter, seed=seed)
    if config.update.kind != "none":
        report = put_updates(model, config.model.name, config.update, seed=config.seed)
    return model, report


def training_of(config: RunConfig, folder: Path) -> LocalTraining:
    """How the run's clients train; what they know from earlier rounds lies in `folder`.

    Under `engine.execution` auto one after the other, until `settle` has chosen.
    """
    return LocalTraining(
        config.federation,
        config.model.jacobian_lambda,
        config.seed,
        config.device,
        config.engine.threads,
        folder,
        personalization_of(config),
        config.codec,
        config.update,
        "sequential" if config.engine.execution == "auto" else config.engine.execution,
        privacy=config.privacy,
        attack=config.attack,
    )
