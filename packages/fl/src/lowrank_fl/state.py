"""The tensors of a model that travel between server and clients."""

from torch import Tensor, nn


def transferred(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and floating-point buffers by name, sharing memory with the model.

    Counters such as a batch norm's `num_batches_tracked` stay behind: an average of counters means nothing.
    """
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def trained_names(model: nn.Module) -> list[str]:
    """The names, among those of `transferred`, of what clients train; the others are statistics."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
