"""The paper's network for FEMNIST and MNIST: two fully connected layers."""

from torch import Tensor, nn

from lowrank_fl.models.initialise import initialise


class MLP(nn.Module):
    """`pixels - width - classes` with a ReLU between; 784-256-62 in the paper (section 3.3)."""

    def __init__(self, in_features: int, num_classes: int, *, width: int = 256) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, width)
        self.fc2 = nn.Linear(width, num_classes)
        initialise(self)

    def forward(self, input: Tensor) -> Tensor:
        return self.fc2(self.fc1(input.flatten(1)).relu())
