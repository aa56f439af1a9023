"""Optimizers and learning-rate schedules by the names of the configuration."""

import contextlib
import math
import os
from collections.abc import Iterable, Mapping, Set
from importlib import import_module
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lowrank_core.errors import LowrankError, UsageError
from lowrank_diffusion.config import TrainConfig

_LEAST_PRODIGY_RATE = 0.01


def build_optimizer(
    train: TrainConfig,
    unet: Iterable[Parameter],
    text: Iterable[Parameter] = (),
    factors: Mapping[Parameter, float] | None = None,
    word: Iterable[Parameter] = (),
    word_lr: float = 0.0,
    magnitudes: Iterable[Parameter] = (),
) -> Optimizer:
    """The configured optimizer: a group for the UNet's parameters and, if there are any, one for the text encoders'.

    Where `factors` multiplies the rates of some, they are in groups of their own. So are the embeddings of a `word`
    and, among the parameters, DoRA's `magnitudes`: what does not start at zero no weight decay draws there.

    Adafactor (Shazeer and Stern, 2018) is transformers', with the configured rate itself: torch's multiplies the rate
    with each tensor's size, and factors that start at zero would hardly move. Prodigy (Mishchenko and Defazio, 2023)
    and schedule-free AdamW (Defazio et al., 2024) are their authors' packages, Lion (Chen et al., 2023) lion-pytorch.

    Raises:
        LowrankError: the optimizer is of a package that is not installed.
        UsageError: rates that Prodigy cannot use.
    """
    text = list(text)
    groups: list[dict[str, Any]] = [{"params": list(unet), "lr": train.lr}]
    rates = dict[str, float]()
    if text:
        rates["train.text_lr"] = train.text_lr or train.lr
        groups.append({"params": text, "lr": rates["train.text_lr"]})
    groups = [part for group in groups for part in _parts(group, factors or {}, set(magnitudes))]
    if embeddings := list(word):
        rates["pivotal.lr"] = word_lr
        groups.append({"params": embeddings, "lr": word_lr, "weight_decay": 0.0})
    decay = train.weight_decay
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=decay)
    if train.optimizer == "adamw8bit":
        return _installed("bitsandbytes.optim", "bitsandbytes", train.optimizer).AdamW8bit(groups, weight_decay=decay)
    if train.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, weight_decay=decay, scale_parameter=False, relative_step=False)
    if train.optimizer == "lion":
        return _installed("lion_pytorch", "lion-pytorch", train.optimizer).Lion(groups, weight_decay=decay)
    if train.optimizer == "schedulefree":
        make = _installed("schedulefree", "schedulefree", train.optimizer).AdamWScheduleFree
        return make(groups, weight_decay=decay)
    return _prodigy(groups, train, rates)


def _parts(
    group: dict[str, Any], factors: Mapping[Parameter, float], magnitudes: Set[Parameter]
) -> list[dict[str, Any]]:
    parts: dict[tuple[float, bool], list[Parameter]] = {}
    for parameter in group["params"]:
        parts.setdefault((factors.get(parameter, 1.0), parameter in magnitudes), []).append(parameter)
    return [
        {"params": parts[factor, kept], "lr": group["lr"] * factor, **({"weight_decay": 0.0} if kept else {})}
        # The first group's rate is the one that a run reports.
        for factor, kept in sorted(parts, key=lambda part: (part[0] != 1, part[1]))
    ]


def _prodigy(groups: list[dict[str, Any]], train: TrainConfig, rates: Mapping[str, float]) -> Optimizer:
    if train.lr < _LEAST_PRODIGY_RATE:
        raise UsageError(
            f"prodigy finds the learning rate itself and multiplies it with train.lr, which is {train.lr:g}; "
            "set train.lr: 1"
        )
    if train.lr_pattern:
        raise UsageError("prodigy has one rate for all parameters; leave train.lr_pattern out")
    for key, rate in rates.items():
        if rate != train.lr:
            raise UsageError(
                f"prodigy has one rate for all parameters, but {key} is {rate:g} and train.lr {train.lr:g}; "
                f"set {key}: {train.lr:g}"
            )
    make = _installed("prodigyopt", "prodigyopt", train.optimizer).Prodigy
    # It prints, and standard output belongs to results.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return make(groups, weight_decay=train.weight_decay, use_bias_correction=True, safeguard_warmup=True)


def _installed(module: str, package: str, optimizer: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise LowrankError(
            f"train.optimizer {optimizer} is of the package {package}, which is not installed; "
            f"install it with pip install {package}, or choose adamw"
        ) from None


def build_schedule(train: TrainConfig, optimizer: Optimizer) -> LambdaLR:
    """The schedule over the run's optimizer steps; call `.step()` once after each of them."""
    return LambdaLR(optimizer, lambda step: rate_factor(train, step))


def rate_factor(train: TrainConfig, step: int) -> float:
    """What the learning rate is multiplied with at optimizer step `step`, which counts from 0.

    Through warm-up it rises evenly, from above 0 so that the first step counts, to 1 at step `warmup`. Then it stays,
    or falls to 0 at step `steps`, along half a cosine or a line.
    """
    if step < train.warmup:
        return (step + 1) / (train.warmup + 1)
    if train.schedule == "constant":
        return 1.0
    share = min(1.0, (step - train.warmup) / max(1, train.steps - train.warmup))
    return 1 - share if train.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))
