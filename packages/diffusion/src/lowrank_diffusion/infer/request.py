"""What pictures `lowrank infer` is asked for, and whether that can be meant."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lowrank_core.errors import LowrankError, UsageError
from lowrank_diffusion.infer.schedulers import check_scheduler

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Request:
    """What is asked for; None leaves a choice to the runs or the base."""

    adapters: Sequence[Path]
    prompts: Sequence[str]
    weights: Sequence[float] = ()
    embeddings: Sequence[str] = ()
    """Files of words' embeddings, `FILE` or `FILE:WORD`."""
    base: str | None = None
    config: str | None = None
    vae: str | None = None
    merged: bool | None = None
    negative: str | None = None
    seed: int = 0
    images: int = 1
    size: str | None = None
    """`WIDTHxHEIGHT`, or one number for a square."""
    steps: int = 25
    guidance: float = 5.0
    scheduler: str | None = None
    batch: int = 1
    grid: bool = False
    device: str = "auto"
    precision: str = "auto"
    out: Path | None = None


def check(request: Request) -> None:
    """See that it can be meant, as far as that shows without a base.

    Raises:
        UsageError: it cannot, such as a size that is no multiple of 8.
    """
    if not request.prompts:
        raise UsageError("an adapter draws what --prompt says; give at least one")
    for option in ("images", "steps", "batch"):
        value = getattr(request, option)
        if value < 1:
            raise UsageError(f"--{option} must be at least 1, got {value}")
    if not 0 <= request.seed < 2**32:
        raise UsageError(f"--seed must be from 0 to {2**32 - 1}, got {request.seed}")
    if not 0 <= request.guidance < float("inf"):
        raise UsageError(f"--guidance must be a number from 0, got {request.guidance}")
    check_scheduler(request.scheduler)
    if request.size is not None:
        size_of(request.size)


def size_of(text: str) -> tuple[int, int]:
    """Width and height of `WIDTHxHEIGHT`, or of one number for a square.

    Raises:
        UsageError: it is neither, or a side is no multiple of 8 from 16.
    """
    found = re.fullmatch(r"(\d+)(?:[x×](\d+))?", text.strip().lower())
    if found is None:
        raise UsageError(f"--size is WIDTHxHEIGHT, such as 1024x768, got {text!r}")
    width, height = int(found[1]), int(found[2] or found[1])
    if width % 8 or height % 8 or min(width, height) < 16:
        raise UsageError(f"--size takes multiples of 8, from 16, got {width}x{height}")
    return width, height


def device_of(name: str) -> torch.device:
    """The device of that name; `auto` is the machine's accelerator, else its CPU.

    Raises:
        LowrankError: there is no such device here.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise LowrankError(f"device {name!r} cannot be used here ({reason}); try --device cpu") from None


def precision_of(name: str, device: torch.device) -> str:
    """The precision of that name; `auto` is bf16 on CUDA and fp32 elsewhere.

    Raises:
        UsageError: no such precision.
    """
    if name == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    if name not in DTYPES:
        raise UsageError(f"--precision is one of auto, {', '.join(DTYPES)}, got {name!r}")
    return name
