"""A small convolutional network that two CPU cores train in minutes."""

import itertools

from torch import Tensor, nn

from lowrank_fl.models.initialise import initialise


class CNN(nn.Module):
    """Three 3x3 convolutions of width, 2·width and 4·width channels, each with 2x2 pooling, GroupNorm and ReLU;
    one linear layer over what is left. Input `(batch, channels, height, width)`, at least 8x8 pixels.
    """

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int, *, width: int = 32) -> None:
        super().__init__()
        in_channels, rows, columns = input_shape
        channels = [in_channels, width, 2 * width, 4 * width]
        blocks: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(channels):
            blocks += [
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                # Pooled first: the norm and the ReLU then touch a quarter of the numbers.
                nn.MaxPool2d(2),
                nn.GroupNorm(min(8, outputs), outputs),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*blocks)
        self.head = nn.Linear(channels[-1] * (rows // 8) * (columns // 8), num_classes)
        initialise(self)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.features(input).flatten(1))
