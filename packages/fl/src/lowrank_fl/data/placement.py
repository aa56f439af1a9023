"""Where a data set lies while clients train on it."""

from dataclasses import replace

import torch

from lowrank_fl.data.examples import Examples

_LARGEST_SHARE = 0.5


def on_device(examples: Examples, device: torch.device, free: int | None = None) -> Examples:
    """The examples on a GPU, where they take up to half of its free memory; else as they are, moved client by client.

    free: the device's free memory in bytes; found out for CUDA if not given, and 0 elsewhere.
    """
    if free is None:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    held = ("inputs", "labels", "test_inputs", "test_labels")
    if sum(getattr(examples, name).nbytes for name in held) > _LARGEST_SHARE * free:
        return examples
    return replace(examples, **{name: getattr(examples, name).to(device) for name in held})
