# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = ["pfl[pytorch]==0.6.0", "safetensors>=0.7"]
# [tool.uv]
# exclude-newer = "2026-11-15T00:00:00Z"
# ///
"""`pfl`: Apple's pfl-research and its SimulatedBackend, set up as its own CIFAR-10 benchmark is.

Runs in an environment of its own (`uv run --script`), because its pins are not ours. Several processes are started
with torchrun, as its guide to distributed simulation says. As in its benchmark, images are floats before the clock
starts, and a client reads them in the order they are stored.
"""

import os
import subprocess
import sys
import types

import numpy as np
import torch
import torch.nn.functional as F
from cells import Clock, Federation, competitor_arguments, read, report
from torch import Tensor, nn


def main() -> None:
    arguments = competitor_arguments()
    if arguments.processes > 1 and "RANK" not in os.environ:
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.processes}"]
        sys.exit(subprocess.call([sys.executable, "-m", *torchrun, __file__, *sys.argv[1:]]))
    simulate(read(arguments.federation), arguments.rounds, arguments.threads, arguments.out)


def simulate(federation: Federation, rounds: int, threads: int, out: str) -> None:
    # pfl joins torchrun's process group when it is imported.
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByUser
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel

    def loss(network: nn.Module, images: Tensor, labels: Tensor, eval: bool = False) -> Tensor:
        network.train(not eval)
        return F.cross_entropy(network(images), labels)

    def metrics(network: nn.Module, images: Tensor, labels: Tensor, eval: bool = True) -> dict[str, Weighted]:
        # pfl asks every client of the first round, and then no more.
        with torch.no_grad():
            return {"loss": Weighted(float(loss(network, images, labels, eval)) * len(labels), len(labels))}

    class EndOfRound(TrainingProcessCallback):
        def after_central_iteration(
            self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
        ) -> tuple[bool, Metrics]:
            clock.mark()
            return False, Metrics()

    torch.set_num_threads(threads)
    torch.manual_seed(int(os.environ.get("RANK", 0)))
    np.random.seed(0)  # the same in every process, so that all of them draw the same cohort
    cell, parts = federation.cell, federation.parts
    images = federation.normalize(federation.images[parts.flatten()]).split(parts.shape[1])
    labels = federation.labels[parts.flatten()].split(parts.shape[1])
    network = federation.network()
    network.loss, network.metrics = types.MethodType(loss, network), types.MethodType(metrics, network)
    clock = Clock()
    users = dict(enumerate(zip(images, labels, strict=True)))
    dataset = FederatedDataset.from_slices(users, get_user_sampler("random", range(cell.clients)))
    model = PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), lr=1.0))
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=1 + rounds,
            evaluation_frequency=1 + rounds,
            train_cohort_size=cell.cohort,
            val_cohort_size=0,
        ),
        SimulatedBackend(dataset, dataset, postprocessors=[WeightByUser()]),
        model,
        NNTrainHyperParams(local_learning_rate=cell.lr, local_num_epochs=1, local_batch_size=cell.batch),
        callbacks=[EndOfRound()],
        send_metrics_to_platform=False,
    )
    if os.environ.get("RANK", "0") == "0":
        report(clock, network, federation, out)


if __name__ == "__main__":
    main()
