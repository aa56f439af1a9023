"""The layers whose ranks compete for one budget, found by the names of their factors."""

# torch leaves the types of modules it yields partly open.
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false, reportUnknownMemberType=false

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lowrank_core.adaptive.importance import Importance
from lowrank_core.errors import LowrankError


@dataclass(frozen=True, eq=False)
class Factor:
    """A parameter with an index of directions: number i of every factor of a side belongs to direction i."""

    parameter: nn.Parameter
    dim: int
    """The dimension that counts the directions."""
    owner: nn.Module
    """What holds the parameter, under the name `leaf`."""
    leaf: str

    @property
    def rank(self) -> int:
        return self.parameter.shape[self.dim]


@dataclass(eq=False)
class Side:
    """Factors that share one index of directions; zeroing a direction in `value` alone switches it off."""

    factors: Mapping[str, Factor]
    value: Factor
    present: list[bool]
    """Which of the directions there were at the start the parameters still hold."""
    mask: Tensor | None = None
    """Which of those that they hold the last allocation kept; None before the first."""

    @property
    def rank(self) -> int:
        """The directions that the parameters hold."""
        return self.value.rank

    def kept(self) -> list[bool]:
        """Which of the directions there were at the start are neither removed nor switched off."""
        if self.mask is None:
            return list(self.present)
        mask = iter(self.mask.tolist())
        return [here and next(mask) for here in self.present]


@dataclass(eq=False)
class Group:
    """One layer's directions: AdaLoRA's triplets are one side, the two terms of a LoHa two."""

    name: str
    sides: list[Side]
    orthonormal: list[Factor] = field(default_factory=list[Factor])
    least_rank: int = 0

    @property
    def home(self) -> nn.Module:
        return self.sides[0].value.owner

    @property
    def factors(self) -> dict[str, Factor]:
        """Those of all sides, by the names that `Importance` has them under."""
        return {f"{self.name}.{leaf}": factor for side in self.sides for leaf, factor in side.factors.items()}

    def scores(self, importance: Importance) -> list[Tensor]:
        """Of each side's directions: the sum over their factors, as for AdaLoRA's triplets."""
        return [
            torch.stack([importance.score(f"{self.name}.{leaf}", f.dim) for leaf, f in side.factors.items()]).sum(0)
            for side in self.sides
        ]


@dataclass(frozen=True)
class _Kind:
    """The leaves of a parameterisation's sides: (name, dimension of directions), the one to zero first.

    A LoHa of rank 0 is nothing that PEFT, LyCORIS or their files know; an AdaLoRA of rank 0 is.
    """

    sides: tuple[tuple[tuple[str, int], ...], ...]
    orthonormal: tuple[str, ...] = ()
    least_rank: int = 0


_KINDS = {
    "adalora": _Kind(((("lora_E", 0), ("lora_A", 0), ("lora_B", 1)),), ("lora_A", "lora_B")),
    "svd": _Kind(((("values", 0), ("left", 1), ("right", 0)),), ("left", "right")),
    "loha": _Kind(((("hada_w1_b", 0), ("hada_w1_a", 1)), (("hada_w2_b", 0), ("hada_w2_a", 1))), least_rank=1),
}


def find_groups(model: nn.Module) -> list[Group]:
    """The trainable AdaLoRA adapters, `svd` layers or LoHa adapters of a model, ours or PEFT's, in the model's order.

    They are told by their parameters: `x.lora_E` beside `x.lora_A` and `x.lora_B`, in PEFT's models
    `x.lora_E.adapter` and so on.

    Raises:
        LowrankError: there are none, they are of several kinds, whose scores do not compare, or a LoHa is in Tucker
            form, whose core ties the two indices of a term together.
    """
    parameters = dict(model.named_parameters())
    found: dict[str, list[Group]] = {}
    for kind, form in _KINDS.items():
        leaf = form.sides[0][0][0]
        for name, parameter in parameters.items():
            path, adapter = _split(name, leaf)
            if path is None or not parameter.requires_grad:
                continue
            group = _group(model, parameters, form, path, adapter)
            if group is None:
                continue
            if _join(path, "hada_t1", adapter) in parameters:
                raise LowrankError(
                    f"{group.name} is a LoHa in Tucker form, whose rank cannot be adapted; use flat factors"
                )
            found.setdefault(kind, []).append(group)
    if not found:
        raise LowrankError(
            "this model has no trainable AdaLoRA or LoHa adapter and no svd layer whose rank could be adapted; "
            "inject one first"
        )
    if len(found) > 1:
        raise LowrankError(
            f"this model has ranks of several kinds, {' and '.join(found)}, whose scores do not compare; "
            "freeze all but one kind"
        )
    return next(iter(found.values()))


def _group(model: nn.Module, parameters: dict[str, nn.Parameter], form: _Kind, path: str, adapter: str) -> Group | None:
    sides: list[Side] = []
    orthonormal: list[Factor] = []
    for leaves in form.sides:
        factors: dict[str, Factor] = {}
        for leaf, dim in leaves:
            name = _join(path, leaf, adapter)
            if name not in parameters:
                return None
            owner, _, own = name.rpartition(".")
            factors[leaf] = Factor(parameters[name], dim, model.get_submodule(owner), own)
            if hasattr(parameters[name], "device_mesh"):
                raise LowrankError(
                    f"{name} is sharded over devices, which ranks cannot follow; use plain data parallelism"
                )
        value = factors[leaves[0][0]]
        sides.append(Side(factors, value, [True] * value.rank))
        orthonormal += [factors[leaf] for leaf in form.orthonormal]
    plain = path.replace("_orig_mod.", "").removeprefix("module.")  # torch.compile's and data parallelism's wrappers
    return Group(f"{plain}.{adapter}" if adapter else plain, sides, orthonormal, form.least_rank)


def _split(name: str, leaf: str) -> tuple[str | None, str]:
    """`x.leaf` as (x, "") and `x.leaf.adapter` as (x, adapter)."""
    parts = name.split(".")
    if parts[-1] == leaf:
        return ".".join(parts[:-1]), ""
    if len(parts) > 1 and parts[-2] == leaf:
        return ".".join(parts[:-2]), parts[-1]
    return None, ""


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
