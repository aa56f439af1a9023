"""A frozen layer and the adapters on it."""

# torch leaves `_apply` untyped.
# pyright: reportUnknownMemberType=false

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from lowrank_core.adapters.dora import Axis, decomposed_change, magnitude_shape, weight_norm
from lowrank_core.adapters.forms import Form, Init
from lowrank_core.adapters.forward import adapted, apply_weight, delta
from lowrank_core.adapters.geometry import Geometry
from lowrank_core.adapters.plain import is_plain
from lowrank_core.adapters.wrapper import Wrapper


class Adapter(nn.Module):
    """One adapter on one layer: factors, and the numbers that go with them.

    The factors are parameters of the names and shapes that `form` gives them. ΔW counts `scaling · weight` times:
    `scaling` follows from rank and alpha, `weight` is the user's (1 unless set). With a `decompose` axis there is also
    the parameter `magnitude`, `(out, 1, ...)` or `(1, in, ...)`, and `weight` multiplies the whole change of the
    layer's weight, so that 0 is the base and 1 is DoRA.

    rank_dropout drops whole outputs of ΔW (of the change, with DoRA: what is left is the base's) and divides by the
    share it keeps if `rescale`; module_dropout drops the adapter for one forward; dropout drops the adapter's inputs
    (an embedding has none to drop).
    """

    def __init__(
        self,
        form: Form,
        geometry: Geometry,
        rank: int,
        alpha: float,
        scaling: float,
        *,
        decompose: Axis | None = None,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
        rescale: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.form = form
        self.geometry = geometry
        self.rank = rank
        self.alpha = alpha
        self.scaling = scaling
        self.weight = 1.0
        self.dropout = dropout
        self.rank_dropout = rank_dropout
        self.module_dropout = module_dropout
        self.rescale = rescale
        shapes = form.shapes(geometry, rank)
        self.factor_names = tuple(shapes)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.decompose: Axis | None = decompose
        if decompose is not None:
            shape = magnitude_shape(geometry.weight_shape, decompose)
            self.magnitude = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

    @property
    def factors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.factor_names}

    @property
    def scale(self) -> float:
        return self.scaling * self.weight

    @torch.no_grad()
    def reset(self, init: Init, base_weight: Tensor) -> None:
        """Draw the factors, and take the magnitudes from the base weight, of `geometry.weight_shape`."""
        self.form.init(self.factors, init)
        if self.decompose is not None:
            self.magnitude.copy_(weight_norm(base_weight.to(self.magnitude.dtype), self.decompose))

    def compose(self) -> Tensor:
        """`weight · scaling · ΔW`, of `geometry.weight_shape` and in the factors' dtype; differentiable."""
        return self.scale * self.form.compose(self.factors, self.geometry)

    def change(
        self, base_weight: Tensor, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> Tensor:
        """What this adapter adds to the base weight, of `geometry.weight_shape`: `compose`, or DoRA's change.

        dtype, device: where to compute; the factors' unless given.
        """
        factors = {name: factor.to(device=device, dtype=dtype) for name, factor in self.factors.items()}
        plain = self.form.compose(factors, self.geometry)
        if self.decompose is None:
            return self.scale * plain
        # A norm over a row of thousands needs more than 16 bits.
        plain = plain.to(torch.promote_types(plain.dtype, torch.float32))
        change = decomposed_change(base_weight.to(plain), self.scaling * plain, self.magnitude.to(plain))
        return self.weight * change

    @property
    def is_simple(self) -> bool:
        """Whether the output is that of ΔW alone: nothing is dropped in this mode, and nothing decomposed."""
        return self.decompose is None and not (
            self.training and (self.dropout or self.rank_dropout or self.module_dropout)
        )

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """What the adapter adds to the output of `base`; a convolution's input has a batch."""
        geometry = self.geometry
        if self.training and self.dropout and x.is_floating_point():
            x = nn.functional.dropout(x, self.dropout)
        if self.decompose is None:
            out = delta(x, self.form, self.factors, self.scale, geometry)
        else:
            # Composed again for the backward pass: kept, the weights of all layers would take more than the base does.
            weight = _weight(base, geometry)
            out = checkpoint(self._decomposed, x, weight, use_reentrant=False, preserve_rng_state=False)
        if self.training and self.rank_dropout:
            kept = (torch.rand(geometry.out_features, device=out.device) > self.rank_dropout).to(out.dtype)
            if self.rescale:
                kept = kept / kept.mean().clamp_min(1 / geometry.out_features)
            out = out * kept.view(-1, *(1,) * len(geometry.kernel))
        if self.training and self.module_dropout:
            # A factor and no branch: it traces, and every parameter keeps a gradient for distributed training.
            out = out * (torch.rand((), device=out.device) > self.module_dropout).to(out.dtype)
        padding = getattr(base, "padding_idx", None)
        if padding is not None:
            out = torch.where((x == padding).unsqueeze(-1), out.detach(), out)
        return out

    def _decomposed(self, x: Tensor, base_weight: Tensor) -> Tensor:
        # Norms and differences of weights need the factors' precision.
        with torch.autocast(x.device.type, enabled=False):
            change = self.change(base_weight)
        return apply_weight(x, change.to(x.dtype) if x.is_floating_point() else change, None, self.geometry)

    def extra_repr(self) -> str:
        return f"{self.form.method}, rank={self.rank}, alpha={self.alpha:g}"


class AdaptedLayer(Wrapper):
    """A frozen layer (`base`), the `adapters` on it by name, and the names of those in use (`active`).

    The output is the base's plus `delta` of each active adapter, in the base's dtype. Linear, convolutions and
    transformers' Conv1D without hooks, under a single adapter, are computed together with it; any other base is called.

    merged: the adapters that the base's weight contains at the moment; `original` keeps the weight without them.
    """

    def __init__(self, base: nn.Module, geometry: Geometry) -> None:
        super().__init__(base)
        self.geometry = geometry
        self.adapters = nn.ModuleDict().train(base.training)
        self.active: list[str] = []
        self.merged: tuple[str, ...] = ()
        self.original: dict[str, nn.Parameter] = {}
        self.disabled = False

    def adapter(self, name: str) -> Adapter:
        adapter = self.adapters[name]
        assert isinstance(adapter, Adapter)
        return adapter

    def base_weight(self) -> Tensor:
        """The base's weight as `geometry.weight_shape`."""
        return _weight(self.base, self.geometry)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kernel = self.geometry.kernel
        if kernel and x.dim() == len(kernel) + 1:  # an example without a batch, as torch's convolutions take
            return self.forward(x.unsqueeze(0), *args, **kwargs).squeeze(0)
        names = [] if self.disabled else [name for name in self.active if name not in self.merged]
        adapters = [self.adapter(name) for name in names]
        if len(adapters) == 1 and adapters[0].is_simple and not args and not kwargs and is_plain(self.base):
            a = adapters[0]
            return adapted(
                x, self.base_weight(), cast("Tensor | None", self.base.bias), a.form, a.factors, a.scale, self.geometry
            )
        out = self.base(x, *args, **kwargs)
        for adapter in adapters:
            out = out + adapter(x, self.base).to(out.dtype)
        return out

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # The weight that merging put aside moves with the layer.
        for parameter in self.original.values():
            with torch.no_grad():
                parameter.data = fn(parameter.data)
        return super()._apply(fn, recurse)


def _weight(base: nn.Module, geometry: Geometry) -> Tensor:
    return geometry.as_stored(cast(Tensor, base.weight))  # transposing undoes itself
