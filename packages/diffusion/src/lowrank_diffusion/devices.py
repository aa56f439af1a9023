"""Where a run computes: one device, or one of several processes that work on the same steps."""

import resource
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_core.errors import LowrankError
from lowrank_diffusion.config import TrainConfig


def make_accelerator(train: TrainConfig) -> Any:
    """Accelerate's `Accelerator` for `train.device`, alone or as the process that the environment says it is.

    It finds the device and its fellow processes and, in fp16, scales the loss. bf16 needs nothing: the frozen base
    computes in bf16, the factors' products too, and the factors stay in fp32.

    Raises:
        LowrankError: there is no such device here, or fp16 is asked for on a CPU.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    device = train.device
    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise LowrankError(f"device {device!r} cannot be used here ({reason}); try -o train.device=cpu") from None
    if PartialState._shared_state and not PartialState().use_distributed:
        # accelerate keeps one state for the whole process, and this may be its second run.
        AcceleratorState._reset_state(reset_partial_state=True)
    on_cpu = device == "cpu" or (device == "auto" and not torch.accelerator.is_available())
    if train.precision == "fp16" and on_cpu:
        raise LowrankError("train.precision is fp16, which CPUs do not train in; set train.precision: bf16 or fp32")
    if ":" in device:
        torch.accelerator.set_device_index(int(device.partition(":")[2]))
    return Accelerator(cpu=on_cpu, mixed_precision="fp16" if train.precision == "fp16" else "no")


def average_gradients(accelerator: Any, parameters: Iterable[nn.Parameter]) -> None:
    """Give every process the mean of all processes' gradients, in one message.

    DistributedDataParallel would send them in pieces while the backward pass runs, which pays where every weight is
    trained. Adapters are small; and their ranks may fall, which its buckets would not follow.
    """
    if accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def gathered(accelerator: Any, *numbers: float | Tensor) -> list[list[float]]:
    """Each process's numbers, by process."""
    own = torch.stack([torch.as_tensor(number, device=accelerator.device).float() for number in numbers])
    return accelerator.gather(own[None]).tolist()


def peak_memory(device: torch.device) -> int:
    """Bytes that tensors on a GPU held at most, or this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
