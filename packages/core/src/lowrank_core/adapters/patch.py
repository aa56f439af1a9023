"""Our forward and backward for the layers of a model that PEFT has injected already."""

# PEFT's layers are met without importing PEFT, so that their attributes are untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from lowrank_core.adapters.forms import AdaLoRAForm, Form, LoHaForm, LoKrForm, LoRAForm
from lowrank_core.adapters.forward import adapted, delta
from lowrank_core.adapters.geometry import Geometry
from lowrank_core.adapters.plain import is_plain
from lowrank_core.errors import LowrankError

_LAYERS: dict[str, tuple[Form, tuple[str, ...]]] = {
    "lora": (LoRAForm(), ("Linear", "Conv1d", "Conv2d", "Conv3d")),
    "loha": (LoHaForm(), ("Linear", "Conv1d", "Conv2d")),
    "lokr": (LoKrForm(), ("Linear", "Conv1d", "Conv2d")),
    "adalora": (AdaLoRAForm(), ("SVDLinear", "SVDConv2d")),
}


@dataclass(frozen=True)
class PatchReport:
    """The layers that have our forward now, and those that keep PEFT's, with the reason."""

    changed: tuple[str, ...]
    left: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{name}: left, {reason}" for name, reason in self.left]
        return "\n".join([*lines, f"{len(self.changed)} layers changed, {len(self.left)} left"])


def patch_peft(model: nn.Module) -> PatchReport:
    """Give PEFT's LoRA, LoHa, LoKr and AdaLoRA layers in `model` our forward and backward, in place.

    Parameters, their names, saving and merging stay PEFT's. Outputs and gradients are PEFT's to rounding (its gradients
    of Tucker kernels are wrong, ours are not); products run in the activation's dtype, where PEFT runs those of
    float32 factors in float32. What a layer does rarely (mixed batches, rank and module dropout, DoRA and other
    variants, merged or disabled adapters) it still does through PEFT. `restore` undoes it.

    Raises:
        LowrankError: the model has no such layer.
    """
    changed: list[str] = []
    left: list[tuple[str, str]] = []
    for name, module in _peft_layers(model):
        reason = _reason_to_leave(module)
        if reason:
            left.append((name, reason))
        elif not isinstance(module, _Patched):
            module.__class__ = _patched(type(module))
            _remember(module)
            changed.append(name)
        else:
            changed.append(name)
    if not changed and not left:
        raise LowrankError(
            "no LoRA, LoHa, LoKr or AdaLoRA layer of PEFT in this model; inject adapters with PEFT first, "
            "or use lowrank_core.inject"
        )
    return PatchReport(tuple(changed), tuple(left))


def restore(model: nn.Module) -> int:
    """Give every patched layer PEFT's own forward again; returns how many there were."""
    count = 0
    for module in model.modules():
        if isinstance(module, _Patched):
            module.__class__ = type(module).__mro__[2]
            del module.lowrank_geometry, module.lowrank_ranks
            count += 1
    return count


class _Patched(nn.Module):
    """What a patched layer's class puts before PEFT's."""

    lowrank_geometry: Geometry
    lowrank_ranks: dict[str, float]
    """AdaLoRA's divisor of the scale by adapter, as numbers: reading them from a GPU would wait for it every time."""

    if TYPE_CHECKING:
        base_layer: nn.Module

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        names = [name for name in layer.active_adapters if name in layer.r]
        single = x.dim() == len(self.lowrank_geometry.kernel) + 1  # an example without a batch
        if args or kwargs or single or layer.disable_adapters or layer.merged or not all(map(self._covers, names)):
            return super().forward(x, *args, **kwargs)
        form, geometry = _form(self), self.lowrank_geometry
        base: Any = self.base_layer
        out: Tensor | None = None
        for name in names:
            given = _factors(self, form, name)
            if not given:
                continue
            scale = layer.scaling[name]
            if isinstance(form, AdaLoRAForm):
                scale = scale / self.lowrank_ranks[name]
            dropout = layer.lora_dropout[name] if hasattr(layer, "lora_dropout") else None
            dropped = x if dropout is None or isinstance(dropout, nn.Identity) else dropout(x)
            if out is None and dropped is x and is_plain(base):
                weight: Tensor = geometry.as_stored(base.weight)
                out = adapted(x, weight, base.bias, form, given, scale, geometry)
            else:
                so_far: Tensor = base(x) if out is None else out
                out = so_far + delta(dropped, form, given, scale, geometry)
        return base(x) if out is None else out

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle looks a class up by its name, and there it finds PEFT's.
        return _rebuild, (type(self).__mro__[2],), self.__dict__

    def _covers(self, name: str) -> bool:
        layer: Any = self
        if name in getattr(layer, "lora_variant", {}) or getattr(layer, "lora_bias", {}).get(name):
            return False
        if isinstance(_form(self), AdaLoRAForm) and name not in self.lowrank_ranks:
            return False
        return not (self.training and (_chance(layer, "rank_dropout", name) or _chance(layer, "module_dropout", name)))


def _peft_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    if "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and (isinstance(module, _Patched) or _method(type(module)) is not None):
            yield name, module


def _method(kind: type) -> str | None:
    """lora, loha, lokr or adalora, from where in PEFT the class is."""
    parts = kind.__module__.split(".")
    return parts[2] if parts[:2] == ["peft", "tuners"] and len(parts) > 2 and parts[2] in _LAYERS else None


def _form(module: nn.Module) -> Form:
    method = _method(type(module).__mro__[2])
    assert method is not None
    return _LAYERS[method][0]


def _reason_to_leave(module: nn.Module) -> str | None:
    kind = type(module).__mro__[2] if isinstance(module, _Patched) else type(module)
    method = _method(kind)
    assert method is not None
    base: Any = getattr(module, "base_layer", None)
    if kind.__name__ not in _LAYERS[method][1]:
        return f"PEFT's {method} {kind.__name__} is not covered"
    geometry = Geometry.of(base)
    if geometry is None or not base.weight.is_floating_point():
        return f"a base layer of type {type(base).__name__} is not covered"
    if method == "lokr" and kind.__name__ == "Conv1d" and len(cast(Any, module).lokr_w2):
        return "PEFT composes a whole lokr_w2 of a Conv1d along other axes than its weight has"
    if method in ("lora", "adalora") and geometry.groups > 1:
        return "PEFT's factors of a grouped convolution mix the groups"
    if "forward" in module.__dict__:
        return "something else has replaced its forward"
    return None


@cache
def _patched(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Patched, kind), {"__module__": kind.__module__})


def _rebuild(kind: type[nn.Module]) -> nn.Module:
    patched = _patched(kind)
    return patched.__new__(patched)


def _remember(module: Any) -> None:
    module.lowrank_geometry = Geometry.of(module.base_layer)
    ranks: Any = getattr(module, "ranknum", {})
    module.lowrank_ranks = {name: rank.item() + 1e-5 for name, rank in ranks.items()}


def _factors(module: Any, form: Form, name: str) -> dict[str, Any]:
    """The factors of one adapter under the form's names, in the form's order."""
    factors: dict[str, Any] = {}
    for key in _NAMES[form.method]:
        held = getattr(module, key, None)
        if held is not None and name in held:
            factor: Any = held[name]
            factors[key] = factor.weight if isinstance(factor, nn.Module) else factor
    return factors


_NAMES = {
    "lora": ("lora_A", "lora_B"),
    "adalora": ("lora_A", "lora_B", "lora_E"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
}


def _chance(layer: Any, kind: str, name: str) -> float:
    return getattr(layer, kind, {}).get(name) or 0.0
