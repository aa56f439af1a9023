"""`ray`: Flower's own simulation, clients as Ray actors of one CPU each, with the hand-written loop's training.

run_simulation is deprecated in favour of `flwr run`, which drives the same backend through a background server.
"""

from cells import Clock, competitor_arguments, read, report, resident_network, train_client
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation


def main() -> None:
    arguments = competitor_arguments()
    path = arguments.federation
    federation = read(path)
    cell = federation.cell
    network = federation.network()
    clock = Clock()

    client_app, server_app = ClientApp(), ServerApp()

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        federation = read(path)
        network = resident_network(path).train()
        network.load_state_dict(message.content["arrays"].to_torch_state_dict())
        rows = federation.parts[int(context.node_config["partition-id"])]
        images = federation.normalize(federation.images[rows])
        loss = train_client(network, images, federation.labels[rows], federation.cell)
        metrics = MetricRecord({"num-examples": len(rows), "loss": float(loss)})
        return Message(RecordDict({"arrays": ArrayRecord(network.state_dict()), "metrics": metrics}), reply_to=message)

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        def round_ended(number: int, _: ArrayRecord) -> None:
            if number:
                clock.mark()

        strategy = FedAvg(
            fraction_train=cell.cohort / cell.clients, fraction_evaluate=0.0, min_available_nodes=cell.clients
        )
        arrays = ArrayRecord(network.state_dict())
        result = strategy.start(grid, arrays, num_rounds=1 + arguments.rounds, evaluate_fn=round_ended)
        assert result.arrays, "every client failed"
        network.load_state_dict(result.arrays.to_torch_state_dict())

    resources = {
        "init_args": {"num_cpus": arguments.processes, "log_to_driver": False},
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    }
    run_simulation(server_app, client_app, cell.clients, backend_config=resources)
    report(clock, network, federation, arguments.out)


if __name__ == "__main__":
    main()
