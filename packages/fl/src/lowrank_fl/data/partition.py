"""Which client holds which training examples, decided by flwr-datasets."""

import io
import warnings
from contextlib import redirect_stderr
from typing import Any

import numpy as np

from lowrank_core.errors import LowrankError, UsageError
from lowrank_fl.config import PartitionConfig
from lowrank_fl.data.cache import logger
from lowrank_fl.data.examples import Examples

# A number of its own, so that these draws are not the first draws of another use of the seed.
_STREAM = 2


def partition_examples(examples: Examples, partition: PartitionConfig, clients: int, seed: int) -> list[np.ndarray]:
    """For each client, the ascending int64 row numbers of its training examples; no row goes twice.

    - `iid`: a random share of equal size, give or take one example;
    - `dirichlet`: each class is divided by proportions drawn from Dirichlet(`alpha`);
    - `pathological`: `classes_per_client` classes each. The first goes round the classes, so that
      every class has a client where there are enough clients; the others are drawn;
    - `natural`: one maker (writer, role) a client, a random `clients` of them in ascending order.

    The result depends on the arguments alone and leaves the global random generators as they were.

    Raises:
        UsageError: a natural partition has no makers, or a client should hold more classes than there are.
        LowrankError: there are too few examples or makers, or a client would have no example.
    """
    if partition.kind == "natural":
        return _natural(examples, clients, seed)
    labels = examples.labels.numpy()
    if clients > len(labels):
        raise LowrankError(
            f"there are {len(labels)} training examples for {clients} clients, and each needs one; "
            f"set federation.clients to {len(labels)} at most, or raise data.max_examples"
        )
    # The partitioners cut the rows, or a class's rows, as they stand.
    rows = np.random.default_rng([seed, _STREAM]).permutation(len(labels))
    columns = {"row": rows, "label": labels[rows]}
    if partition.kind == "iid":
        return _iid(columns, clients)
    if partition.kind == "dirichlet":
        return _dirichlet(columns, partition.alpha, clients, seed)
    return _pathological(columns, partition.classes_per_client, clients, seed)


def _iid(columns: dict[str, np.ndarray], clients: int) -> list[np.ndarray]:
    # flwr-datasets takes seconds to import, here and below.
    from flwr_datasets.partitioner import IidPartitioner

    return _apply(IidPartitioner(clients), columns, clients)


def _dirichlet(columns: dict[str, np.ndarray], alpha: float, clients: int, seed: int) -> list[np.ndarray]:
    from flwr_datasets.partitioner import DirichletPartitioner

    def partitioned(min_partition_size: int) -> list[np.ndarray]:
        partitioner = DirichletPartitioner(
            clients,
            "label",
            alpha,
            min_partition_size,
            # The proportions are plain draws; balancing would cap the large clients.
            self_balancing=False,
            shuffle=False,
            seed=seed,
        )
        return _apply(partitioner, columns, clients)

    try:
        with warnings.catch_warnings():
            # It warns at each of its ten new draws, and draws again only while a client is empty.
            warnings.simplefilter("ignore", UserWarning)
            return partitioned(min_partition_size=1)
    except ValueError as error:
        empty = sum(len(rows) == 0 for rows in partitioned(min_partition_size=0))
        raise LowrankError(
            f"{empty} of {clients} clients would hold no example under a Dirichlet partition with alpha {alpha} "
            f"of {len(columns['row'])} examples; set fewer federation.clients or a larger partition.alpha"
        ) from error


def _pathological(columns: dict[str, np.ndarray], classes_per_client: int, clients: int, seed: int) -> list[np.ndarray]:
    from flwr_datasets.partitioner import PathologicalPartitioner

    classes = np.unique(columns["label"])
    if classes_per_client > len(classes):
        raise UsageError(
            f"partition.classes_per_client is {classes_per_client}, but the training examples have "
            f"{len(classes)} classes; set it to {len(classes)} at most"
        )
    partitioner = PathologicalPartitioner(
        clients, "label", classes_per_client, "first-deterministic", shuffle=False, seed=seed
    )
    try:
        with warnings.catch_warnings():
            # We say below which classes are left out.
            warnings.simplefilter("ignore", UserWarning)
            parts = _apply(partitioner, columns, clients)
    except ValueError as error:
        raise LowrankError(
            f"a class has fewer examples than clients that should hold some of it ({clients} clients of "
            f"{classes_per_client} classes, {len(columns['row'])} examples); set fewer federation.clients or a smaller "
            "partition.classes_per_client"
        ) from error
    held = np.isin(columns["row"], np.concatenate(parts))
    left_out = np.setdiff1d(classes, columns["label"][held])
    if len(left_out):
        logger.info(
            "No client holds %d of %d classes (label numbers %s): %d clients of %d classes each",
            len(left_out),
            len(classes),
            ", ".join(map(str, left_out)),
            clients,
            classes_per_client,
        )
    return parts


def _natural(examples: Examples, clients: int, seed: int) -> list[np.ndarray]:
    from flwr_datasets.partitioner import NaturalIdPartitioner

    if examples.groups is None:
        raise UsageError(
            f"partition.kind=natural needs to know who made each example, and {examples.name} was loaded without; "
            "set partition.id_column to the column that says it"
        )
    makers = sorted(set(examples.groups))
    if clients > len(makers):
        raise LowrankError(
            f"{examples.name} has {len(makers)} makers of training examples for {clients} clients; "
            f"set federation.clients to {len(makers)} at most"
        )
    chosen = np.sort(np.random.default_rng([seed, _STREAM]).choice(len(makers), clients, replace=False))
    client_of = {makers[maker]: client for client, maker in enumerate(chosen)}
    client = np.array([client_of.get(group, -1) for group in examples.groups])
    rows = np.flatnonzero(client >= 0)
    # It shows a progress bar and takes no option against it.
    with redirect_stderr(io.StringIO()):
        return _apply(NaturalIdPartitioner("client"), {"row": rows, "client": client[rows]}, clients)


def _apply(partitioner: Any, columns: dict[str, np.ndarray], clients: int) -> list[np.ndarray]:
    """The `row` column of every partition, ascending.

    Only numbers pass through the partitioner: pictures would be copied for nothing.
    """
    from datasets import Dataset

    # Not in numpy's format: the partitioners go through a column one number at a time, and that is six times slower.
    partitioner.dataset = Dataset.from_dict(columns)
    parts = (partitioner.load_partition(client).with_format("numpy") for client in range(clients))
    return [np.sort(part[:]["row"].astype(np.int64)) for part in parts]
