"""VGG16 with GroupNorm, the paper's network for CIFAR-10, CIFAR-100 and CINIC-10."""

from torch import Tensor, nn

from lowrank_fl.models.initialise import initialise

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """VGG16 (Simonyan and Zisserman, 2015) for 32x32 pixels: GroupNorm after each of the 13 convolutions
    (Hsieh et al., 2020) and a 512-512-classes head. The paper does not state the number of groups; two, as in
    Flower's baseline. 15.25M parameters with ten classes (Table 5).
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage in _STAGES:
            for channels in stage:
                layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.GroupNorm(2, channels), nn.ReLU()]
                in_channels = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Linear(512, num_classes),
        )
        initialise(self)

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(self.features(input).flatten(1))
