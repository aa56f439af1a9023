"""Any adapter as a plain LoRA: exactly where a rank is found at which it is one, and truncated on request.

| from | rank |
|---|---|
| LoRA, also its Tucker form | r |
| AdaLoRA | the directions that are not zeroed |
| LoHa, flat or Tucker | min(r², out, in·K) |
| LoKr | min(rank(W1)·rank(W2), out, in·K) |

Where a product's rank would exceed the layer's, ΔW itself is one factor and the identity the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowrank_core.adapters.config import LoRA
from lowrank_core.adapters.forms import AdaLoRAForm, Form, LoHaForm, LoKrForm, LoRAForm
from lowrank_core.adapters.geometry import Geometry
from lowrank_core.errors import LowrankError, UsageError
from lowrank_core.files import grouped
from lowrank_core.files.bundle import AdapterFile, Layers, ModuleAdapter, with_patterns
from lowrank_core.files.peft_config import carried_over
from lowrank_core.files.shapes import check_kernels_known, geometry_of
from lowrank_core.files.tensors import stored_dtype
from lowrank_core.fitting.low_rank import truncated, whole_pair


@dataclass(frozen=True)
class LoRAExport:
    """An adapter as LoRA.

    rank: the largest of a module. exact: nothing was cut off, so that only rounding to the stored dtype is left.
    energy, lost: the sum of the squares of the scaled ΔW, and of what truncation took from it.
    """

    file: AdapterFile
    rank: int
    exact: bool
    energy: float
    lost: float

    @property
    def lost_energy(self) -> float:
        return self.lost / self.energy if self.energy else 0.0


def as_lora(
    file: AdapterFile, layers: Layers | None = None, rank: int | None = None, *, magnitudes: bool = False
) -> LoRAExport:
    """The adapter as a LoRA with factors in fp32 (fp64 from fp64); a LoRA is given back as it is, bits and all.

    layers: the model's layers. Without them a flat convolution's kernel is not known, and layers whose names say that
        they are convolutions are refused.
    rank: cut every module off at this rank, by the singular values of its ΔW (Eckart-Young), computed in float64.
    magnitudes: keep those of DoRA, which scale the sum of the weight and ΔW, however ΔW is written.

    Raises:
        LowrankError: weight decomposition without `magnitudes`, for readers of plain LoRA would drop them; a flat
            convolution without the model; factors that do not fit the layer.
        UsageError: a rank below 1.
    """
    if rank is not None and rank < 1:
        raise UsageError(f"rank must be at least 1, got {rank}")
    config = file.config
    if config.weight_decompose and not magnitudes:
        raise LowrankError(
            "an adapter with weight decomposition (DoRA) is no plain LoRA; write the equal LoRA with DoRA (form lora "
            "or diffusers, without a rank), or merge it"
        )
    if isinstance(config, LoRA) and not config.tucker and (rank is None or _largest(file) <= rank):
        return LoRAExport(file, _largest(file), True, 0.0, 0.0)
    if layers is None:
        check_kernels_known(config, {name: module.factors for name, module in file.modules.items()})
    file = grouped.from_peft(file)
    geometries = {name: geometry_of(config, name, m.factors, layers) for name, m in file.modules.items()}
    modules: dict[str, ModuleAdapter] = {}
    energy = lost = 0.0
    for name, module in file.modules.items():
        geometry, scaling = geometries[name], file.scaling(name)
        factors = {key: factor.double() for key, factor in module.factors.items()}
        up, down = exact_pair(config.form, factors, geometry)
        if rank is not None and up.shape[1] > rank:
            up, down, kept, gone = truncated(up, down, rank)
            energy, lost = energy + scaling**2 * (kept + gone), lost + scaling**2 * gone
        elif rank is not None:
            energy += scaling**2 * float(((up.T @ up) * (down @ down.T)).sum())
        if not (torch.isfinite(up).all() and torch.isfinite(down).all()):
            raise LowrankError(f"{name} has numbers that are not finite; take an earlier checkpoint of the adapter")
        dtype = stored_dtype(next(iter(module.factors.values())))
        plain = lora_module(up.to(dtype), down.to(dtype), geometry, scaling)
        modules[name] = replace(plain, magnitude=module.magnitude, axis=module.axis)
    lora = LoRA(
        target_modules=[],
        modules_to_save=config.modules_to_save,
        weight_decompose=config.weight_decompose,
        other_fields=carried_over(config),
    )
    result = replace(file, config=with_patterns(lora, modules), modules=modules)
    return LoRAExport(result, _largest(result), lost == 0, energy, lost)


def _largest(file: AdapterFile) -> int:
    return max(module.rank for module in file.modules.values())


def lora_module(up: Tensor, down: Tensor, geometry: Geometry, scaling: float) -> ModuleAdapter:
    """The factors in PEFT's shapes, and the alpha that keeps the scale out of them."""
    rank, kernel = up.shape[1], geometry.kernel
    if geometry.kind == "embedding":
        factors = {"lora_embedding_A": down, "lora_embedding_B": up}
    else:
        ones = (1,) * len(kernel)
        inputs = geometry.weight_shape[1]
        factors = {"lora_A": down.reshape(rank, inputs, *kernel), "lora_B": up.reshape(-1, rank, *ones)}
    return ModuleAdapter(factors, rank, scaling * rank)


def exact_pair(form: Form, factors: Mapping[str, Tensor], geometry: Geometry) -> tuple[Tensor, Tensor]:
    """ΔW = up · down, unscaled: `(out, R)` and `(R, in·K)`, with R no larger than the layer."""
    if isinstance(form, LoHaForm):
        up, down = _loha(form, factors, geometry)
    elif isinstance(form, LoKrForm):
        up, down = _lokr(form, factors, geometry)
    elif isinstance(form, AdaLoRAForm):
        up, down = _kept(factors)
    else:
        assert isinstance(form, LoRAForm)
        return form.pair(factors, geometry)
    outputs, inputs = geometry.matrix_shape
    if up.shape[1] <= min(outputs, inputs):
        return up, down
    return whole_pair(form.compose(factors, geometry).reshape(outputs, inputs))


def _loha(form: LoHaForm, factors: Mapping[str, Tensor], geometry: Geometry) -> tuple[Tensor, Tensor]:
    """The Khatri-Rao products of both sides' factors.

    A Tucker side is a product too: of its output factor, and of its core with the input factor multiplied in.
    """
    if "hada_t1" not in factors:
        pair = form.pair(factors, geometry)
        assert pair is not None
        return pair
    ups = [factors[f"hada_w{side}_a"].T for side in (1, 2)]
    # (r, r, K): the outputs' rank first.
    downs = [
        torch.einsum("pqk,qi->pik", factors[f"hada_t{side}"].flatten(2), factors[f"hada_w{side}_b"]).flatten(1)
        for side in (1, 2)
    ]
    up = (ups[0].unsqueeze(2) * ups[1].unsqueeze(1)).flatten(1)
    down = (downs[0].unsqueeze(1) * downs[1].unsqueeze(0)).flatten(0, 1)
    return up, down


def _lokr(form: LoKrForm, factors: Mapping[str, Tensor], geometry: Geometry) -> tuple[Tensor, Tensor]:
    """(U1 V1) ⊗ (U2 V2) = (U1 ⊗ U2)(V1 ⊗ V2), each side a product already or of one by the identity."""
    first, second = form.sides(factors, geometry)
    up1, down1 = _side(first, factors.get("lokr_w1_a"), factors.get("lokr_w1_b"))
    decomposed = "lokr_t2" not in factors
    flat = second.flatten(1)
    up2, down2 = _side(flat, *((factors.get(f"lokr_w2_{end}") if decomposed else None) for end in ("a", "b")))
    if "lokr_t2" in factors:
        down = torch.einsum("pqk,qi->pik", factors["lokr_t2"].flatten(2), factors["lokr_w2_b"]).flatten(1)
        up2, down2 = factors["lokr_w2_a"].T.contiguous(), down
    return torch.kron(up1, up2), torch.kron(down1, down2)


def _side(whole: Tensor, up: Tensor | None, down: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is not None and down is not None and up.shape[1] <= min(whole.shape):
        return up, down
    return whole_pair(whole)


def _kept(factors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """AdaLoRA's directions that are not zeroed; one at least, for a LoRA has no rank 0."""
    up, down = factors["lora_B"], factors["lora_E"] * factors["lora_A"]
    kept = (factors["lora_E"].flatten() != 0).nonzero().flatten()
    if not len(kept):
        return up.new_zeros(up.shape[0], 1), down.new_zeros(1, down.shape[1])
    return up[:, kept], down[kept]
