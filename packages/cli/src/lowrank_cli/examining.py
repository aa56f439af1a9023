"""What `lowrank doctor` looks at. Packages are known by their metadata; torch alone is imported, for its devices."""

import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, cast

_EXTRAS = {
    "fl": ("lowrank-fl", "flwr", "ray", "torchvision"),
    "diffusion": ("lowrank-diffusion", "diffusers", "transformers", "peft", "accelerate"),
    "privacy": ("dp-accounting",),
    "quantize": ("bitsandbytes",),
    "serve": ("gradio",),
}
"""What each extra of `lowrank` brings."""
_ALWAYS = ("lowrank", "lowrank-core", "torch", "safetensors")
_FREE_DISK, _SHARED_MEMORY = 5 * 2**30, 2**30
"""Bytes below which a run may not end well: checkpoints and caches, and what worker processes share."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    outcome: `missing` is needed by every command, `warning` only by some.
    text: what was found, and what to do where that is not enough.
    """

    name: str
    outcome: Literal["ok", "warning", "missing"]
    text: str


@dataclass(frozen=True)
class Findings:
    """versions: by package, None where it is not installed. disk, shared_memory: free bytes; None where unknown."""

    python: str
    platform: str
    packages: Mapping[str, str | None]
    extras: Mapping[str, bool]
    devices: list[dict[str, Any]]
    cores: int
    threads: int | None
    disk: int
    shared_memory: int | None
    folders: Mapping[str, str]
    checks: list[Check]

    def tree(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)

    def sections(self) -> dict[str, dict[str, str]]:
        """As text, by heading."""
        devices = {each["name"]: each["text"] for each in self.devices} or {"cpu": "not known without torch"}
        memory = "none" if self.shared_memory is None else _gigabytes(self.shared_memory)
        return {
            "Versions": {
                "python": f"{self.python} on {self.platform}",
                **{name: found or "not installed" for name, found in self.packages.items()},
            },
            "Extras": {name: "installed" if there else "not installed" for name, there in self.extras.items()},
            "Devices": devices,
            "Machine": {
                "cores": str(self.cores),
                "threads": "not known without torch" if self.threads is None else f"{self.threads} of torch",
                "free disk": f"{_gigabytes(self.disk)} here",
                "/dev/shm": f"{memory} free",
            },
            "Folders": dict(self.folders),
        }


def examine() -> Findings:
    """Look at this machine, from the current folder."""
    names = [*_ALWAYS, *(name for brought in _EXTRAS.values() for name in brought)]
    packages = {name: _version(name) for name in names}
    extras = {extra: all(packages[name] for name in brought) for extra, brought in _EXTRAS.items()}
    devices, threads, fault = _torch()
    disk = shutil.disk_usage(Path.cwd()).free
    shared = Path("/dev/shm")
    memory = shutil.disk_usage(shared).free if shared.is_dir() else None
    folders = _folders()
    checks = [_check_torch(fault), *(_check_extra(extra, packages) for extra in _EXTRAS)]
    checks += [_check_gpu(devices), _check_disk(disk), _check_memory(memory)]
    checks += [_check_folder(name, Path(path)) for name, path in folders.items()]
    return Findings(
        platform.python_version(),
        platform.platform(terse=True),
        packages,
        extras,
        devices,
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads,
        disk,
        memory,
        folders,
        checks,
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torch() -> tuple[list[dict[str, Any]], int | None, str]:
    """The devices that torch sees, its threads, and why it cannot be imported, if so."""
    try:
        import torch
    # A broken installation fails with whatever its libraries fail with.
    except Exception as error:
        return [], None, " ".join(str(error).split()) or type(error).__name__
    devices: list[dict[str, Any]] = [{"name": "cpu", "text": platform.processor() or platform.machine()}]
    for number in range(torch.cuda.device_count()):
        about: Any = cast(Any, torch.cuda).get_device_properties(number)
        text = f"{about.name}, {_gigabytes(about.total_memory)}, compute capability {about.major}.{about.minor}"
        devices.append({"name": f"cuda:{number}", "text": text, "memory_bytes": about.total_memory})
    if torch.backends.mps.is_available():
        devices.append({"name": "mps", "text": "Apple GPU"})
    return devices, torch.get_num_threads(), ""


def _folders() -> dict[str, str]:
    """Where downloads and caches go."""
    hub = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface")
    own = Path(os.environ.get("LOWRANK_CACHE") or "~/.cache/lowrank")
    return {
        "lowrank cache": str(own.expanduser()),
        "Hugging Face cache": str(hub.expanduser()),
        "temporary files": tempfile.gettempdir(),
    }


def _check_torch(fault: str) -> Check:
    if fault:
        return Check("torch", "missing", f"it cannot be imported ({fault}); install it again: pip install torch")
    return Check("torch", "ok", "it is imported")


def _check_extra(extra: str, packages: Mapping[str, str | None]) -> Check:
    lacking = [name for name in _EXTRAS[extra] if packages[name] is None]
    if lacking:
        text = f'{", ".join(lacking)} not installed; get it with: pip install "lowrank[{extra}]"'
        return Check(f"extra {extra}", "warning", text)
    return Check(f"extra {extra}", "ok", "all of its packages are installed")


def _check_gpu(devices: list[dict[str, Any]]) -> Check:
    if len(devices) > 1:
        return Check("accelerator", "ok", f"{devices[1]['name']} is there")
    return Check(
        "accelerator",
        "warning",
        "torch sees none; federated runs of small networks and the tiny SDXL do without, and SDXL itself needs a GPU. "
        "Where the machine has one, install its driver and torch's build for it",
    )


def _check_disk(free: int) -> Check:
    if free < _FREE_DISK:
        return Check("disk", "warning", f"{_gigabytes(free)} free here; give --out a folder on a larger disk")
    return Check("disk", "ok", f"{_gigabytes(free)} free here")


def _check_memory(free: int | None) -> Check:
    if free is not None and free < _SHARED_MEMORY:
        return Check(
            "shared memory",
            "warning",
            f"{_gigabytes(free)} free in /dev/shm, through which worker processes share data; give a container more "
            "(docker run --shm-size=2g), or set engine.workers=1",
        )
    return Check("shared memory", "ok", "enough for worker processes")


def _check_folder(name: str, path: Path) -> Check:
    there = next(place for place in (path, *path.parents) if place.exists())
    if os.access(there, os.W_OK):
        return Check(name, "ok", f"{path} can be written to")
    return Check(
        name, "warning", f"{path} cannot be written to; give its folder another place (LOWRANK_CACHE, HF_HOME, TMPDIR)"
    )


def _gigabytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
