"""Adapters onto a pipeline's networks: into the weights where that loses nothing, else beside them."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lowrank_core.adapters.control import set_active
from lowrank_core.adapters.inject import remove
from lowrank_core.adapters.merge import merge, unmerge
from lowrank_core.errors import LowrankError
from lowrank_core.files.bundle import Component
from lowrank_core.files.model import layers_of_model, load
from lowrank_core.files.read import read
from lowrank_diffusion.infer.sources import Source

MOST_LOST = 0.01
"""Adapters are merged where rounding to the weights' dtype loses less than this share of what they change."""

_NETWORKS: dict[Component, str] = {"unet": "unet", "te1": "text_encoder", "te2": "text_encoder_2", "": "unet"}


def apply(
    pipeline: Any, sources: Sequence[Source], merged: bool | None, note: Callable[[str], None]
) -> dict[str, bool]:
    """Put adapters on the networks they are for, each with its weight.

    Args:
        pipeline: an SDXL of diffusers; its networks are changed.
        sources: several on one layer are summed.
        merged: whether to merge; None where it loses less than `MOST_LOST`.
        note: told what was done.

    Returns:
        For each network that has adapters, whether they were merged.

    Raises:
        LowrankError: a source that is no adapter or does not fit this base; with `merged`, what merging raises.
    """
    held: defaultdict[str, list[tuple[str, float]]] = defaultdict(list)
    known: dict[Component, Any] = {
        part: layers_of_model(getattr(pipeline, name))
        for part, name in _NETWORKS.items()
        if part and name in pipeline.components
    }
    for number, source in enumerate(sources, 1):
        name = f"adapter{number}"
        try:
            places = dict.fromkeys(_NETWORKS[file.component] for file in read(source.path, known, whole=True))
            for place in places:
                load(getattr(pipeline, place), source.path, name)
                held[place].append((name, source.weight))
        except LowrankError as error:
            if str(source.path) in str(error):
                raise
            raise LowrankError(f"{source.path} does not go onto this base: {error}") from None
    return {place: _settle(place, getattr(pipeline, place), own, merged, note) for place, own in held.items()}


def _settle(
    place: str,
    network: nn.Module,
    adapters: Sequence[tuple[str, float]],
    merged: bool | None,
    note: Callable[[str], None],
) -> bool:
    set_active(network, [name for name, _ in adapters], [weight for _, weight in adapters])
    network.requires_grad_(False)
    if merged is False:
        note(f"{place}: adapters stay beside the weights")
        return False
    try:
        report = merge(network)
    except LowrankError as error:
        if merged:
            raise
        note(f"{place}: adapters stay beside the weights, since {error}")
        return False
    dtype = str(report.layers[0].dtype).removeprefix("torch.")
    lost = f"of the change, {report.lost:.2g} is lost by rounding to {dtype}"
    if merged or report.lost < MOST_LOST:
        remove(network, keep_merged=True)
        note(f"{place}: adapters merged into {len(report.layers)} layers; {lost}")
        return True
    unmerge(network)
    note(f"{place}: adapters stay beside the weights, since {lost} when they are merged")
    return False
