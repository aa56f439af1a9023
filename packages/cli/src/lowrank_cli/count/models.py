"""From the MODEL of a command line to a network on the meta device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_core.errors import LowrankError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from lowrank_core.costs.trace import ForwardCost
    from lowrank_core.ranks import RankRule

NETWORKS = ("vgg16", "resnet18", "lstm", "mlp", "cnn")
SDXL = ("sdxl", "sdxl-unet")


@dataclass(frozen=True)
class CountedModel:
    """A network to be counted. `cost` is None, for the reason in `untraced`, where no forward could be followed."""

    name: str
    model: "nn.Module"
    cost: "ForwardCost | None"
    untraced: str = ""
    exclude: Sequence[str] = ()
    rules: "Mapping[str, RankRule]" = field(default_factory=dict[str, Any])


def find_model(
    name: str, input_shape: tuple[int, ...] | None, classes: int | None, note: Callable[[str], None]
) -> CountedModel:
    """The network that `name` means; `note` is told of downloads.

    Raises:
        UsageError: no such model, or an option that it does not take.
        LowrankError: a folder or hub id without a usable config.json.
    """
    is_folder = Path(name).is_dir()
    if name in NETWORKS or (name.startswith("torchvision:") and not is_folder):
        from lowrank_fl.models.blank import blank_preset, blank_torchvision

        own, shape, number = name.removeprefix("torchvision:"), input_shape, classes
        blank = blank_preset(own, shape, number) if name in NETWORKS else blank_torchvision(own, shape, number)
        cost, reason = _traced(blank.model, (blank.example,), {})
        return CountedModel(name, blank.model, cost, reason, blank.exceptions.exclude, blank.exceptions.rules)
    if input_shape or classes:
        option = "--input" if input_shape else "--classes"
        raise UsageError(f"{option} is for {', '.join(NETWORKS)} and torchvision's models, got the model {name!r}")
    if name in SDXL:
        return _sdxl(name)
    if is_folder or "/" in name:
        if not is_folder and (name.startswith((".", "/")) or Path(name).exists()):
            raise LowrankError(f"there is no folder {name}; give a folder with a config.json")
        from lowrank_diffusion.folders import blank_from_config

        network = blank_from_config(name, note)
        if not network.arguments and not network.named:
            return CountedModel(name, network.model, None, "what it reads is not known here")
        return CountedModel(name, network.model, *_traced(network.model, network.arguments, network.named))
    known = [*NETWORKS, *SDXL]
    near = get_close_matches(name, known, n=2, cutoff=0.4)
    raise UsageError(
        f"unknown model {name!r}; "
        + (f"nearest: {', '.join(near)}" if near else f"presets are {', '.join(known)}")
        + "; or give torchvision:NAME, a folder with a config.json, or a hub id OWNER/NAME"
    )


def _sdxl(name: str) -> CountedModel:
    from torch import nn

    from lowrank_core.costs.trace import ForwardCost
    from lowrank_diffusion.outline import outlined
    from lowrank_diffusion.sdxl import COMPONENTS

    if name == "sdxl-unet":
        return CountedModel(name, *outlined("unet"))
    whole, flops, layers = nn.Module(), 0, dict[str, Any]()
    for component in COMPONENTS:
        model, cost = outlined(component)
        whole.add_module(component, model)
        flops += cost.flops
        layers |= {f"{component}.{layer}": call for layer, call in cost.layers.items()}
    return CountedModel(name, whole, ForwardCost(flops, layers))


def _traced(model: "nn.Module", arguments: tuple[Any, ...], named: dict[str, Any]) -> "tuple[ForwardCost | None, str]":
    from lowrank_core.costs.trace import trace

    try:
        return trace(model, *arguments, **named), ""
    # Whatever a model's own code raises on the meta device, its parameters can still be counted.
    except Exception as error:
        return None, f"its forward does not run on the meta device ({type(error).__name__})"
