"""Which network, and what of it is trained: itself, its factors, an adapter on it, or its change as factors."""

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from lowrank_fl.config.section import Fraction, NumberFromZero, Section

Method = Literal["original", "lowrank", "fedpara", "pfedpara", "svd", "kronecker"]

NETWORKS = ("cnn", "mlp", "vgg16", "resnet18", "lstm")
"""Our own; other networks come from torchvision or from a folder of transformers."""


def check_network(name: str) -> str:
    """The name, which is to be that of a network; raises ValueError where it cannot be."""
    if name in NETWORKS or name.startswith("torchvision:") or "/" in name or Path(name).is_dir():
        return name
    nearest = get_close_matches(name, NETWORKS, n=1)
    raise ValueError(
        f"is {', '.join(NETWORKS)}, torchvision:NAME, or a folder that transformers has saved, got {name!r}"
        + (f"; nearest: {nearest[0]}" if nearest else "")
    )


class ModelConfig(Section):
    """Which network, and how its weights are written as factors."""

    name: Annotated[str, AfterValidator(check_network)] = "cnn"
    """One of `NETWORKS`, `torchvision:NAME`, or a folder with a classifier of pictures or texts as transformers saves
    it; these two bring weights of their own, and their last layer is drawn anew where it is of other classes."""
    pretrained: bool = True
    """Of the two: take their weights; drawn from the seed otherwise."""
    pixels: PositiveInt | None = None
    """Of the two: scale pictures to so many pixels a side, inside the network; to what a folder's config.json says, or
    not at all, if not given."""
    method: Method = "fedpara"
    gamma: Fraction | None = None
    """The paper's rank rule: 0 is the smallest rank without a rank limit, 1 the original's size."""
    ratio: Fraction | None = None
    """The authors' notebook's rank rule: factor parameters as a fraction of the layer's."""
    rank: PositiveInt | None = None
    """One rank for every layer."""
    budget: PositiveInt | str | None = None
    """The whole model's size: a number of parameters, or text such as `1.5M` or `6MB`."""
    init: Literal["calibrated", "paper", "flower"] = "calibrated"
    tanh: bool = False
    """W = tanh(W1) * tanh(W2) (FedPara, appendix B)."""
    jacobian_lambda: NumberFromZero = 0.0
    """Weight of the Jacobian correction, Eq. 9 (0: none)."""
    hybrid: Annotated[int, Field(ge=0)] = 0
    """So many of the layers that would become factors, the first ones, stay as they are: the hybrid network of
    Pufferfish (Wang et al., 2021, https://arxiv.org/abs/2103.03936)."""
    width: PositiveInt = 32
    """Channels of the small CNN's first convolution, or the hidden units of the MLP."""
    start: str | None = None
    """The folder of a finished run, whose weights every client starts from. An adapter in that run is merged into its
    layers; weights that are factors here and were not there are cut off their SVD, under `svd` alone; the last layer is
    drawn anew where its shape differs. Everything is drawn from the seed when not given."""

    @model_validator(mode="after")
    def _one_rank_rule(self) -> "ModelConfig":
        given = [key for key in ("gamma", "ratio", "rank", "budget") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"takes one rank rule, got {' and '.join(given)}")
        return self

    @model_validator(mode="after")
    def _weights_are_kept(self) -> "ModelConfig":
        if self.name not in NETWORKS and self.pretrained and self.method != "original":
            raise ValueError(
                f"method {self.method} draws factors in place of the weights that {self.name} brings; set "
                "model.method=original, which an adapter needs too, or model.pretrained=false"
            )
        return self


class AdapterConfig(Section):
    """The adapter that is trained in place of the network, whose weights are then frozen and never travel.

    Norms are trained whole beside it.
    """

    method: Literal["lora", "loha", "lokr", "adalora"] | None = None
    """None when not given: the whole network is trained, and no other key here is read."""
    rank: PositiveInt = 8
    alpha: PositiveFloat = 8
    """What the adapter adds is multiplied by alpha / rank."""
    init: Literal["peft", "lycoris"] | None = None
    """How the factors begin, as in these libraries. `lycoris` for LoHa if not given, because from PEFT's small factors
    plain SGD hardly moves their product; `peft` for the others, AdaLoRA's being made orthonormal."""
    target: str | list[str] | None = None
    """The layers it goes to: names or their endings, one regular expression for whole names, or `all-linear`. Every
    Linear and Conv2d if not given."""
    head: bool = True
    """The last layer is trained whole and has no adapter; otherwise it is a layer as any other."""
    target_rank: PositiveInt | None = None
    """AdaLoRA: the mean rank of a layer at the end; half of `rank`, where it starts, rounded up, if not given."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """AdaLoRA: the share of the rounds before ranks begin to fall."""
    settle: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """AdaLoRA: the share of the rounds after they have fallen."""
    orthogonality: NumberFromZero = 0.5
    """AdaLoRA: the weight of the penalty that keeps a layer's directions apart."""

    @property
    def last_rank(self) -> int:
        """`target_rank` under AdaLoRA, or what it means where it is not given; the others' `rank`."""
        return (self.target_rank or (self.rank + 1) // 2) if self.method == "adalora" else self.rank

    @model_validator(mode="after")
    def _ranks_fall(self) -> "AdapterConfig":
        if self.method != "adalora":
            return self
        if self.target_rank is not None and self.target_rank > self.rank:
            raise ValueError(
                f"target_rank is {self.target_rank}, above the rank of {self.rank} that layers start with; lower "
                "target_rank or raise rank"
            )
        if self.warmup + self.settle >= 1:
            raise ValueError(
                f"warmup and settle are shares of the rounds that leave some of them, got {self.warmup:g} and "
                f"{self.settle:g}; lower one of them"
            )
        return self


class UpdateConfig(Section):
    """FedMUD: clients train, and send, a few factors of each layer's change in place of the layer.

    Norms and biases are trained whole beside them (Li et al., 2025, https://arxiv.org/abs/2505.23176).
    """

    kind: Literal["none", "low-rank", "kronecker"] = "none"
    """How a layer's change is written: `u vᵀ`, or blocks `u ⊗ v` one after the other. `none` trains the layers
    themselves, and no other key here is read."""
    ratio: Annotated[float, Field(gt=0, lt=1)] = 1 / 32
    """Numbers in the factors, as a share of the layer's."""
    aware: bool = True
    """u v'ᵀ + u' vᵀ with random u' and v' that everybody draws from the seed, so that the server's mean is exact;
    otherwise u vᵀ, u and v being trained together."""
    interval: PositiveInt = 1
    """After so many rounds the change is merged into the layer, and the factors begin anew."""
    scale: PositiveFloat = 1.0
    """What is random in the factors is uniform between -scale and scale; a step grows with its square."""
    whole_ends: bool = True
    """The first and the last layer are trained whole."""
