"""A Flower app of one's own: FedPara's layers in its network, FedDyn of lowrank_fl as its strategy.

The two apps stand as they would in any Flower project; `main` runs them in Flower's simulation.
"""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # Flower reads it when it is imported

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from sklearn.datasets import load_digits
from torch import nn

from lowrank_core import factorize
from lowrank_fl.drift import feddyn_drift, feddyn_gradient
from lowrank_fl.flower.strategies import FedDyn

CLIENTS, ROUNDS, LR, ALPHA = 4, 6, 0.1, 0.05


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
    factorize(model, "fedpara", gamma=0.2)
    return model


def digits(part: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every client has its own classes, two or three of the ten; part CLIENTS is the test set."""
    data = load_digits()
    pixels, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    rows = torch.arange(len(labels))
    mine = rows % 5 == 0 if part == CLIENTS else (rows % 5 != 0) & (labels % CLIENTS == part)
    return pixels[mine], labels[mine]


client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    model, (pixels, labels) = network(), digits(int(context.node_config["partition-id"]))
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    received = {name: p.detach().clone() for name, p in model.named_parameters()}
    # What FedDyn's client keeps from its last round.
    kept = context.state.array_records.get("own")
    own = kept.to_torch_state_dict() if kept else {name: torch.zeros_like(p) for name, p in received.items()}
    drift = feddyn_drift(own, ALPHA)
    optimizer = torch.optim.SGD(model.parameters(), LR)
    losses = []
    for rows in torch.randperm(len(labels)).split(16):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(pixels[rows]), labels[rows])
        loss.backward()
        for name, p in model.named_parameters():
            p.grad += drift.offsets[name] + drift.proximal * (p.detach() - received[name])
        optimizer.step()
        losses.append(loss.item())
    trained = {name: p.detach() for name, p in model.named_parameters()}
    context.state["own"] = ArrayRecord(feddyn_gradient(own, received, trained, ALPHA))
    metrics = MetricRecord({"num-examples": len(labels), "loss": sum(losses) / len(losses)})
    return Message(RecordDict({"arrays": ArrayRecord(trained), "metrics": metrics}), reply_to=message)


server_app = ServerApp()


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    model, (pixels, labels) = network(), digits(CLIENTS)

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        with torch.no_grad():
            accuracy = (model(pixels).argmax(1) == labels).float().mean().item()
        print(f"round {number}: accuracy {accuracy:.1%}", flush=True)
        return MetricRecord({"accuracy": accuracy})

    print(f"{sum(p.numel() for p in model.parameters()):,} parameters travel", flush=True)
    names = [name for name, _ in model.named_parameters()]
    strategy = FedDyn(
        parameters=names, clients=CLIENTS, alpha=ALPHA, fraction_evaluate=0.0, min_available_nodes=CLIENTS
    )
    strategy.start(
        grid, ArrayRecord(model.state_dict()), num_rounds=ROUNDS, train_config=ConfigRecord(), evaluate_fn=evaluate
    )


def main() -> None:
    run_simulation(server_app, client_app, num_supernodes=CLIENTS)


if __name__ == "__main__":
    main()
