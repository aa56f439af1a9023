"""What a user says of an adapter: the method, its rank, and the layers it goes to. Fields have PEFT's meaning."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from lowrank_core.adapters.dora import Axis
from lowrank_core.adapters.forms import AdaLoRAForm, Form, Init, LoHaForm, LoKrForm, LoRAForm
from lowrank_core.errors import UsageError, shortened


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What the four methods share.

    rank, alpha: the adapter's scale is alpha / rank, or alpha / √rank with `rank_stabilized` (rsLoRA).
    target_modules: name suffixes, one regular expression that matches whole names, or `"all-linear"`.
    layers_to_transform: of the layers that `target_modules` lists, only those of these numbers; the number is what
        follows `layers_pattern` in a name, or the name's first number.
    rank_pattern, alpha_pattern: a rank or alpha of their own for the layers whose names end in a match of the key.
    modules_to_save: modules trained whole, beside the adapter.
    rank_dropout: whole outputs of ΔW are dropped; module_dropout: the whole adapter is, for one forward;
    dropout: of the adapter's input.
    weight_decompose: DoRA's magnitudes; along `"out"` (one for each output, DoRA's and PEFT's) or `"in"`
        (one for each input, older LyCORIS files).
    other_fields: fields of an adapter_config.json that mean nothing here, kept for writing it again.

    Raises:
        UsageError: a rank below 1, an alpha that is not positive, a dropout outside [0, 1), `layers_to_transform`
            without a list to narrow, `layers_pattern` without `layers_to_transform`.
    """

    rank: int = 8
    alpha: float = 8
    target_modules: Sequence[str] | str
    exclude_modules: Sequence[str] | str = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float])
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] = ()
    init_weights: Init = "peft"
    rank_stabilized: bool = False
    weight_decompose: Axis | None = None
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    other_fields: Mapping[str, Any] = field(default_factory=dict[str, Any])

    method = ""

    def __post_init__(self) -> None:
        ranks: dict[str, Any] = {"rank": self.rank, **self.rank_pattern}
        for name, rank in ranks.items():
            if not isinstance(rank, int):
                raise UsageError(f"rank must be a whole number, got {shortened(repr(rank))} for {shortened(name)}")
            if rank < 1:
                raise UsageError(f"rank must be at least 1, got {rank} for {shortened(name)}")
        alphas: dict[str, Any] = {"alpha": self.alpha, **self.alpha_pattern}
        for name, alpha in alphas.items():
            if not isinstance(alpha, int | float) or not math.isfinite(alpha):
                raise UsageError(f"alpha must be a finite number, got {shortened(repr(alpha))} for {shortened(name)}")
            if alpha <= 0:
                raise UsageError(f"alpha must be positive, got {alpha} for {shortened(name)}")
        if self.init_weights not in get_args(Init):
            raise UsageError(f"init_weights must be one of {', '.join(get_args(Init))}, got {self.init_weights!r}")
        for name in ("dropout", "rank_dropout", "module_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.weight_decompose not in (None, "out", "in"):
            raise UsageError(f'weight_decompose must be "out", "in" or None, got {self.weight_decompose!r}')
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise UsageError(
                "layers_to_transform narrows a list of target_modules, "
                f"got the string {shortened(repr(self.target_modules))}; put the layers' numbers into the expression, "
                "or give a list"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise UsageError(
                f"layers_pattern {shortened(repr(self.layers_pattern))} says where layers_to_transform finds its "
                "numbers, and that is not given; give both"
            )

    @property
    def form(self) -> Form:
        raise NotImplementedError

    def scaling(self, rank: int, alpha: float) -> float:
        """The number that multiplies the composed ΔW."""
        return alpha / rank**0.5 if self.rank_stabilized else alpha / rank


@dataclass(frozen=True, kw_only=True)
class LoRA(AdapterConfig):
    """ΔW = B A (Hu et al., 2021). tucker: conv kernels through a core of their own (LyCORIS's LoCon)."""

    tucker: bool = False
    method = "lora"

    @property
    def form(self) -> Form:
        return LoRAForm(self.tucker)


@dataclass(frozen=True, kw_only=True)
class LoHa(AdapterConfig):
    """ΔW = (A1 B1) ⊙ (A2 B2). tucker: PEFT's `use_effective_conv2d`."""

    tucker: bool = False
    method = "loha"

    @property
    def form(self) -> Form:
        return LoHaForm(self.tucker)


@dataclass(frozen=True, kw_only=True)
class LoKr(AdapterConfig):
    """ΔW = W1 ⊗ W2. factor: PEFT's `decompose_factor`; rank_dropout_scale: divide by what rank dropout keeps."""

    factor: int = -1
    decompose_both: bool = False
    tucker: bool = False
    rank_dropout_scale: bool = False
    method = "lokr"

    @property
    def form(self) -> Form:
        return LoKrForm(self.factor, self.decompose_both, self.tucker)


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(AdapterConfig):
    """ΔW = B diag(E) A; `rank` is where it starts and `target_rank` the mean rank of a layer at the end.

    The budget stays at the start for the share `warmup` of the run's steps, then falls by a cubic to the target, and
    stays there for the share `settle`; every `every` steps the least important values E are zeroed. `beta1`, `beta2`
    smooth importance and its uncertainty; `orthogonality` weighs the penalty on A Aᵀ - I and Bᵀ B - I.
    """

    rank: int = 12
    target_rank: int = 8
    warmup: float = 0.1
    settle: float = 0.5
    every: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5
    method = "adalora"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.target_rank <= self.rank:
            raise UsageError(f"target_rank must be from 1 to rank, got {self.target_rank} with rank {self.rank}")
        if not (self.warmup >= 0 and self.settle >= 0 and self.warmup + self.settle < 1):
            raise UsageError(
                f"warmup and settle are shares of the run that leave some of it, got {self.warmup} and {self.settle}"
            )
        if self.every < 1:
            raise UsageError(f"every must be at least 1 step, got {self.every}")

    @property
    def form(self) -> Form:
        return AdaLoRAForm()

    def scaling(self, rank: int, alpha: float) -> float:
        """alpha / (rank + 1e-5), as PEFT: `rank` is the initial one, so that pruning changes no scale."""
        return alpha / (rank + 1e-5)
