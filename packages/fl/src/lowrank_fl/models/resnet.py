"""ResNet18 as torchvision has it, with its input stage fitted to small pictures."""

from torch import nn


def resnet18(in_channels: int, num_classes: int, *, small: bool) -> nn.Module:
    """Torchvision's ResNet18 with batch normalisation kept, as in the paper's appendix.

    small: for pictures of 32 pixels, a 3x3 first convolution of stride 1 and no pooling after it.
    """
    from torchvision.models import resnet18 as torchvision_resnet18

    model = torchvision_resnet18(num_classes=num_classes)
    if small:
        model.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        model.add_module("maxpool", nn.Identity())
    elif in_channels != 3:
        model.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
    return model
