"""What every benchmark says first: where and with what it ran; and how numbers are summed up."""

import os
import platform
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(device: str = "cpu") -> dict[str, str | int]:
    """CPU, cores, versions and date; the GPU too where `device` is cuda."""
    about: dict[str, str | int] = {
        "cpu": _cpu(),
        "cores": cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
    }
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("--device cuda: torch finds no CUDA device here; leave the option out for the CPU")
        about["gpu"] = torch.cuda.get_device_name()
    return about


def describe(about: dict[str, str | int]) -> str:
    """One line for the top of a table."""
    line = "{cpu}, {cores} cores · {system} · Python {python} · torch {torch} · {date}".format(**about)
    return f"{line} · {about['gpu']}" if "gpu" in about else line


def plain_float32() -> None:
    """Have cuDNN convolve float32 in float32: by default it rounds to TF32, and no two competitors would agree."""
    import torch

    torch.backends.cudnn.conv.fp32_precision = "ieee"


def reason_of(error: BaseException) -> str:
    """One line of why something was left out."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, least and greatest: `2.31 (2.25 to 2.60)`; a single value as it is."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
