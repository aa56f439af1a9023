"""A small convolutional network that two CPU cores train in minutes."""

from torch import Tensor, nn

from lowrank_fl.models.initialise import initialise


class CNN(nn.Module):
    """Three 3x3 convolutions of width, 2·width and 4·width channels, each with GroupNorm, ReLU and 2x2 pooling;
    global average pooling and one linear layer. Input `(batch, channels, height, width)`, at least 8x8 pixels.
    """

    def __init__(self, in_channels: int, num_classes: int, *, width: int = 32) -> None:
        super().__init__()
        channels = [in_channels, width, 2 * width, 4 * width]
        blocks: list[nn.Module] = []
        for inputs, outputs in zip(channels, channels[1:], strict=False):
            blocks += [
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                nn.GroupNorm(2, outputs),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.features = nn.Sequential(*blocks)
        self.head = nn.Linear(channels[-1], num_classes)
        initialise(self)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.features(input).mean(dim=(2, 3)))
