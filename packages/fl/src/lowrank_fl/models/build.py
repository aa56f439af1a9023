"""From the `model` section of a run to a network, factorized as its method says."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from lowrank_core import FactorizeReport, Gamma, LowrankError, factorize
from lowrank_core.candidates import find_candidates, select
from lowrank_core.errors import UsageError
from lowrank_core.ranks import RankRule
from lowrank_fl.config import NETWORKS, ModelConfig

_DEFAULT_GAMMA = 0.1


@dataclass(frozen=True)
class Exceptions:
    """What the paper does not factorize in a network, and layers with a rank rule of their own."""

    exclude: tuple[str, ...] = ()
    rules: Mapping[str, RankRule] = field(default_factory=dict[str, RankRule])


EXCEPTIONS: dict[str, Exceptions] = {
    # Below three input channels the paper's rule gives the first convolution rank 1: every filter a multiple of one.
    "cnn": Exceptions(exclude=("features.0", "head")),
    "mlp": Exceptions(),
    "vgg16": Exceptions(exclude=("classifier",)),
    # Appendix: the first two layers and the 1x1 convolutions keep the original's size.
    "resnet18": Exceptions(
        exclude=("fc",), rules=dict.fromkeys(("conv1", "layer1.0.conv1", "*.downsample.0"), Gamma(1.0))
    ),
    "lstm": Exceptions(exclude=("decoder",)),
}

# The last layer of each network, which the personalised methods of FedPer's family leave with the clients.
HEADS: dict[str, str] = {
    "cnn": "head",
    "mlp": "fc2",
    "vgg16": "classifier.6",
    "resnet18": "fc",
    "lstm": "decoder",
}


def head_of(name: str, model: nn.Module) -> str:
    """The last layer of the network of that name."""
    if name in HEADS:
        return HEADS[name]
    from lowrank_fl.models.pretrained import Pretrained

    assert isinstance(model, Pretrained)
    return model.head


def build_model(
    config: ModelConfig, input_shape: tuple[int, ...], num_classes: int, *, seed: int
) -> tuple[nn.Module, FactorizeReport | None]:
    """The network on the default device, drawn from `seed`, and what was factorized (None for `original`).

    Every call with the same arguments gives the same bits; torch's global random state is left as it was.

    Raises:
        LowrankError: the model does not read inputs of that shape, or `hybrid` leaves nothing to factorize.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _original(config, input_shape, num_classes)
        if config.method == "original":
            return model, None
        exceptions = EXCEPTIONS.get(config.name) or Exceptions(exclude=(head_of(config.name, model),))
        exclude = exceptions.exclude
        if config.hybrid:
            would_be, _ = select(find_candidates(model)[0], ("*",), exclude)
            if config.hybrid >= len(would_be):
                raise UsageError(
                    f"model.hybrid is {config.hybrid}, and {config.name} has {len(would_be)} layers that would become "
                    f"factors; keep fewer of them whole, or set model.method=original"
                )
            exclude += tuple(candidate.name for candidate in would_be[: config.hybrid])
        has_rule = any(rule is not None for rule in (config.gamma, config.ratio, config.rank, config.budget))
        report = factorize(
            model,
            config.method,
            gamma=config.gamma if has_rule else _DEFAULT_GAMMA,
            ratio=config.ratio,
            rank=config.rank,
            budget=config.budget,
            exclude=exclude,
            exceptions={name: rule for name, rule in exceptions.rules.items() if name not in exclude},
            init=config.init,
            # tanh is FedPara's alone, so that a sweep over methods can share one config.
            tanh=config.tanh and config.method == "fedpara",
        )
        return model, report


def _original(config: ModelConfig, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    if config.name not in NETWORKS:
        from lowrank_fl.models.pretrained import build_pretrained

        return build_pretrained(
            config.name, input_shape, num_classes, pretrained=config.pretrained, pixels=config.pixels
        )
    is_text = len(input_shape) == 1
    if is_text != (config.name == "lstm"):
        kind = "text" if is_text else "pictures"
        raise LowrankError(
            f"model {config.name!r} does not read {kind}; "
            + ("use model.name=lstm" if is_text else "lstm reads text, the other models read pictures")
        )
    if config.name == "lstm":
        from lowrank_fl.models.lstm import CharacterLSTM

        return CharacterLSTM(num_classes)
    channels, height, width = input_shape
    if config.name == "mlp":
        from lowrank_fl.models.mlp import MLP

        return MLP(math.prod(input_shape), num_classes, width=config.width)
    if config.name == "cnn":
        _check_size(config.name, height, width, 8)
        from lowrank_fl.models.cnn import CNN

        return CNN((channels, height, width), num_classes, width=config.width)
    if config.name == "vgg16":
        if (height, width) != (32, 32):
            raise LowrankError(
                f"model 'vgg16' reads 32x32 pixels, the pictures have {height}x{width}; use model.name=cnn"
            )
        from lowrank_fl.models.vgg import VGG16

        return VGG16(channels, num_classes)
    _check_size(config.name, height, width, 16)
    from lowrank_fl.models.resnet import resnet18

    return resnet18(channels, num_classes, small=max(height, width) <= 64)


def _check_size(model: str, height: int, width: int, least: int) -> None:
    if min(height, width) < least:
        raise LowrankError(
            f"model {model!r} reads pictures of at least {least}x{least} pixels, these have {height}x{width}"
        )
