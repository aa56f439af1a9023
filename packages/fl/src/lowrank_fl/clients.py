"""A run's examples and who holds them, from its configuration alone."""

import numpy as np

from lowrank_fl.config import RunConfig
from lowrank_fl.data import load_examples, partition_examples
from lowrank_fl.data.examples import Examples
from lowrank_fl.seeds import derive_seed


def examples_of(config: RunConfig) -> Examples:
    """The data set that `config` names, whole; raises LowrankError where it cannot be had."""
    return load_examples(config.data, config.partition, derive_seed(config.seed, "data"))


def parts_of(config: RunConfig, examples: Examples) -> list[np.ndarray]:
    """Each client's rows of the training examples; raises LowrankError where a client would hold none."""
    seed = derive_seed(config.seed, "partition")
    return partition_examples(examples, config.partition, config.federation.clients, seed)
