"""`lowrank`: our engine as `lowrank fl run` drives it, with Flower's own FedAvg and the bytes measured."""

import torch
from cells import Clock, competitor_arguments, read, report

from lowrank_fl.config import FederationConfig, StrategyConfig
from lowrank_fl.data.examples import Examples, Parts
from lowrank_fl.flower.grid import LocalGrid
from lowrank_fl.flower.records import to_arrays, to_record
from lowrank_fl.flower.rounds import Server
from lowrank_fl.flower.strategies import make_strategy
from lowrank_fl.flower.wire import Wire
from lowrank_fl.flower.workers import make_executor
from lowrank_fl.state import transferred
from lowrank_fl.training import LocalTraining


def main() -> None:
    arguments = competitor_arguments()
    # As in a run: the processes start while the data is loaded.
    executor = make_executor(arguments.processes)
    federation = read(arguments.federation)
    cell = federation.cell
    network = federation.network()
    # Copied out of the mapped file: worker processes are handed shared memory.
    images, labels, test_images, test_labels = (
        tensor.clone()
        for tensor in (federation.images, federation.labels, federation.test_images, federation.test_labels)
    )
    examples = Examples(
        "cifar10", images, labels, test_images, test_labels, tuple("0123456789"), federation.mean, federation.std
    )
    clock = Clock()
    config = FederationConfig(
        clients=cell.clients, clients_per_round=cell.cohort, epochs=1, batch_size=cell.batch, lr=cell.lr
    )
    how = LocalTraining(config, 0.0, 0, "cpu", arguments.threads, execution=arguments.execution)
    executor.set_up(network, examples, Parts(list(federation.parts.numpy()), []), how)
    grid = LocalGrid(cell.clients, executor.execute, shared=executor.shared)
    strategy = make_strategy(StrategyConfig(), config, [name for name, _ in network.named_parameters()])
    arrays = to_record(transferred(network), shared=executor.shared)
    for trained in Server(strategy, grid, config, Wire(), 0).rounds(arrays, 1 + arguments.rounds):
        clock.mark()
        arrays = trained.arrays
    executor.close()
    network.load_state_dict({name: torch.from_numpy(values) for name, values in to_arrays(arrays).items()})
    report(clock, network, federation, arguments.out)


if __name__ == "__main__":
    main()
