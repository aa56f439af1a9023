"""Layers that add a trained update to a frozen weight, and how they come into a network."""

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_core import FactorizeReport, UsageError
from lowrank_core.candidates import LeftEntry
from lowrank_core.replacement import FactorizedEntry
from lowrank_fl.config import UpdateConfig
from lowrank_fl.seeds import derive_seed
from lowrank_fl.updates.forms import PRODUCTS, UpdateForm


class WeightUpdate(nn.Module):
    """The factors of one weight's change; calling it composes the change, in the weight's shape.

    `u` and `v` are parameters. The fixed sides are buffers that no state dict holds: they follow from the seed.

    number: the weight's place among those with an update.
    """

    def __init__(self, form: UpdateForm, *, seed: int, number: int) -> None:
        super().__init__()
        self.form, self.seed, self.number = form, seed, number
        for name, value in self.start(0).items():
            if name in form.trained:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value, persistent=False)

    def start(self, period: int) -> dict[str, Tensor]:
        """All factors as that period begins; periods count from 0."""
        return self.form.draw(derive_seed(self.seed, "update", period, self.number))

    def forward(self) -> Tensor:
        return self.form.compose(dict(itertools.chain(self.named_parameters(), self.named_buffers())))

    def extra_repr(self) -> str:
        return str(self.form)


class UpdatedLinear(nn.Module):
    """`y = x (W + ΔW)ᵀ + b`, W frozen; input `(..., in_features)`, output `(..., out_features)`."""

    def __init__(self, source: nn.Linear, update: WeightUpdate) -> None:
        super().__init__()
        self.weight, self.bias, self.update = source.weight, source.bias, update
        self.weight.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight + self.update(), self.bias)


class UpdatedConv2d(nn.Module):
    """A convolution by `W + ΔW`, W frozen; input `(batch, in_channels, height, width)`."""

    def __init__(self, source: nn.Conv2d, update: WeightUpdate) -> None:
        super().__init__()
        self.weight, self.bias, self.update = source.weight, source.bias, update
        self.weight.requires_grad_(False)
        self.stride, self.padding, self.dilation = source.stride, source.padding, source.dilation
        self.groups = source.groups

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight + self.update()
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def put_updates(model: nn.Module, network: str, config: UpdateConfig, *, seed: int) -> FactorizeReport:
    """Put an update on the Linear and Conv2d layers of a network, in place; their weights are frozen afterwards.

    The names stay; beside `NAME.weight` there are `NAME.update.u` and `NAME.update.v`. A weight whose factors would
    hold as many numbers or more stays as it is.

    network: the model's name.
    seed: of the run; everybody draws the same from it.

    Returns:
        The layers with an update, as `factorize` reports those that it changes; `params` of a layer are the factors'.
        The model's own stay what they were, because updates end up in the weights.

    Raises:
        UsageError: no layer is left for an update.
    """
    assert config.kind != "none"
    params = sum(parameter.numel() for parameter in model.parameters())
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    changed: list[FactorizedEntry] = []
    left: list[LeftEntry] = []
    for place, (name, layer) in enumerate(found):
        if config.whole_ends and place in (0, len(found) - 1):
            left.append(LeftEntry(name, "excluded"))
            continue
        shape = tuple(layer.weight.shape)
        form = UpdateForm(PRODUCTS[config.kind](shape, config.ratio), config.aware, config.scale)
        if form.size >= layer.weight.numel():
            left.append(
                LeftEntry(name, f"the factors of its update would hold {form.size:,} numbers, no fewer than it")
            )
            continue
        update = WeightUpdate(form, seed=seed, number=len(changed))
        own = UpdatedLinear(layer, update) if isinstance(layer, nn.Linear) else UpdatedConv2d(layer, update)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, own)
        rank, reach = form.product.rank, form.product.largest_rank * (2 if config.aware else 1)
        reach = min(reach, shape[0], layer.weight[0].numel())
        changed.append(FactorizedEntry(name, type(layer).__name__, shape, rank, reach, layer.weight.numel(), form.size))
    if not changed:
        between = " between its first and its last layer" if config.whole_ends else ""
        raise UsageError(
            f"model {network!r} has no Linear or Conv2d{between} that update.kind {config.kind} would make smaller at "
            f"update.ratio {config.ratio:g}; set update.whole_ends=false or a smaller ratio, or update.kind=none"
        )
    return FactorizeReport(tuple(changed), tuple(left), params, params)
