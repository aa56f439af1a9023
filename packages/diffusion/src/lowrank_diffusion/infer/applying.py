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


class Applied:
    """Adapters on the networks that they are for, loaded once and weighed as often as is asked.

    Args:
        pipeline: an SDXL of diffusers; its networks are changed.
        sources: several on one layer are summed.
        merged: whether to merge; None where it loses less than `MOST_LOST`.
        once: they are weighed only once, so what another time would need leaves the memory.

    Raises:
        LowrankError: a source that is no adapter or does not fit this base.
    """

    def __init__(self, pipeline: Any, sources: Sequence[Source], merged: bool | None, *, once: bool) -> None:
        self._wanted, self._once = merged, once
        self._held: defaultdict[str, list[int]] = defaultdict(list)
        self._networks: dict[str, nn.Module] = {
            name: getattr(pipeline, name) for name in set(_NETWORKS.values()) if name in pipeline.components
        }
        self._weights: Sequence[float] | None = None
        self._merged: dict[str, bool] = {}
        known: dict[Component, Any] = {
            part: layers_of_model(self._networks[name])
            for part, name in _NETWORKS.items()
            if part and name in self._networks
        }
        for number, source in enumerate(sources):
            try:
                places = dict.fromkeys(_NETWORKS[file.component] for file in read(source.path, known, whole=True))
                for place in places:
                    load(self._networks[place], source.path, _name(number))
                    self._held[place].append(number)
            except LowrankError as error:
                if str(source.path) in str(error):
                    raise
                raise LowrankError(f"{source.path} does not go onto this base: {error}") from None

    def weigh(self, weights: Sequence[float], note: Callable[[str], None]) -> dict[str, bool]:
        """Let each source count this much.

        Args:
            weights: one for each source.
            note: told what was done.

        Returns:
            For each network that has adapters, whether they are merged.

        Raises:
            LowrankError: with `merged`, what merging raises.
        """
        if weights != self._weights:
            self._weights = None
            for place, numbers in self._held.items():
                network = self._networks[place]
                if self._merged.pop(place, False):
                    unmerge(network)
                set_active(network, [_name(number) for number in numbers], [weights[number] for number in numbers])
                network.requires_grad_(False)
                self._merged[place] = _settle(place, network, self._wanted, note)
                if self._once and self._merged[place]:
                    remove(network, keep_merged=True)
            self._weights = weights
        return dict(self._merged)


def _name(number: int) -> str:
    return f"adapter{number + 1}"


def _settle(place: str, network: nn.Module, merged: bool | None, note: Callable[[str], None]) -> bool:
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
        note(f"{place}: adapters merged into {len(report.layers)} layers; {lost}")
        return True
    unmerge(network)
    note(f"{place}: adapters stay beside the weights, since {lost} when they are merged")
    return False
