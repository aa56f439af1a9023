"""The networks on the meta device, to be counted: neither weights nor data."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lowrank_core.costs.trace import CountFlops
from lowrank_core.errors import LowrankError
from lowrank_fl.config import ModelConfig
from lowrank_fl.models.build import EXCEPTIONS, Exceptions, build_model
from lowrank_fl.models.pretrained import builder_of


@dataclasses.dataclass(frozen=True)
class BlankModel:
    """A model on the meta device, one example of what it reads, and what the paper leaves whole in it."""

    model: nn.Module
    example: Tensor
    exceptions: Exceptions


@dataclasses.dataclass(frozen=True)
class _Preset:
    input_shape: tuple[int, ...]
    classes: int
    width: int = 32


PRESETS: Mapping[str, str] = {
    "vgg16": "VGG16 with GroupNorm for 32x32 pixels, the paper's",
    "resnet18": "ResNet18 for 32x32 pixels",
    "lstm": "the paper's character LSTM",
    "mlp": "the paper's two layers for handwriting, 784-256-62",
    "cnn": "a small CNN for 32x32 pixels",
}
_PRESETS: Mapping[str, _Preset] = {
    "vgg16": _Preset((3, 32, 32), 10),
    "resnet18": _Preset((3, 32, 32), 10),
    "lstm": _Preset((80,), 80),
    "mlp": _Preset((1, 28, 28), 62, width=256),
    "cnn": _Preset((3, 32, 32), 10),
}
_PIXELS = {"inception_v3": 299}


def blank_preset(name: str, input_shape: tuple[int, ...] | None = None, classes: int | None = None) -> BlankModel:
    """A network of `lowrank fl run`, by its name in `model.name`.

    Args:
        name: one of `PRESETS`.
        input_shape: of one example: `(channels, height, width)`, or the characters of a text.
        classes: outputs of the last layer.

    Raises:
        LowrankError: the network does not read inputs of that shape.
    """
    preset = _PRESETS[name]
    shape = input_shape or preset.input_shape
    config = ModelConfig.model_validate({"name": name, "method": "original", "width": preset.width})
    with torch.device("meta"), CountFlops():
        model, _ = build_model(config, shape, classes or preset.classes, seed=0)
        example = torch.empty(1, *shape, dtype=torch.int64 if name == "lstm" else None)
    return BlankModel(model, example, EXCEPTIONS[name])


def blank_torchvision(name: str, input_shape: tuple[int, ...] | None = None, classes: int | None = None) -> BlankModel:
    """A model of torchvision, by the name of its builder.

    Raises:
        UsageError: torchvision has no model of that name.
        LowrankError: the model cannot be built without weights, or with so many classes.
    """
    builder = builder_of(name)
    pixels = _PIXELS.get(name, 224)
    options = {} if classes is None else {"num_classes": classes}
    try:
        with torch.device("meta"), CountFlops():
            model = builder(weights=None, **options)
            example = torch.empty(1, *(input_shape or (3, pixels, pixels)))
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise LowrankError(
            f"torchvision's {name} cannot be built on the meta device: {error}; try another model"
        ) from None
    return BlankModel(model, example, Exceptions())
