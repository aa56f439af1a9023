"""The tensors of a model: which travel between server and clients, and which are each client's own."""

from dataclasses import dataclass

from torch import Tensor, nn

from lowrank_core.factorizations import Hadamard
from lowrank_core.layers.weight import FactorizedWeight
from lowrank_fl.config import Kind, RunConfig
from lowrank_fl.models.build import HEADS, head_of


@dataclass(frozen=True)
class Personalization:
    """What of a model each client has to itself, and how it trains that.

    pfedpara: the factors of W2 in every W1 ⊙ (W2 + 1) (Hyeon-Woo et al., 2022, Algorithm 2). fedper: the last layer,
    trained with the rest (Arivazhagan et al., 2019, https://arxiv.org/abs/1912.00818). fedrep: the last layer, trained
    before the rest (Collins et al., 2021, https://arxiv.org/abs/2102.07078). ditto: a whole model beside the shared one
    (Li et al., 2021, https://arxiv.org/abs/2012.04221). local: everything. finetune: nothing; the shared model is
    trained further before each test (`test_epochs`).
    """

    kind: Kind = "none"
    head: str = ""
    """The name of the model's last layer; of another library's network it is found in the model."""
    epochs: int = 1
    """Of the client's own part under fedrep and ditto."""
    mu: float = 0.0
    """Ditto: weight of ½‖v - w‖², v the client's own model and w the one it received."""
    test_epochs: int = 0
    """Of the whole model, before each test of it."""


SHARED = Personalization()
"""Nothing is any client's own."""


def personalization_of(config: RunConfig) -> Personalization:
    own = config.personalization
    epochs = own.epochs or config.federation.epochs
    return Personalization(config.personalized, HEADS.get(config.model.name, ""), epochs, own.mu, config.test_epochs)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and floating-point buffers by name, sharing memory with the model.

    Counters such as a batch norm's `num_batches_tracked` stay behind: an average of counters means nothing.
    """
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What of `state_of` training may change: parameters that require gradients, and statistics.

    A frozen parameter, of a network under an adapter, follows from the configuration, so everyone who builds the model
    has it: it neither travels nor is kept by anyone.
    """
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: tensor for name, tensor in state_of(model).items() if name not in frozen}


def local_names(model: nn.Module, personalization: Personalization) -> frozenset[str]:
    """The names, among those of `trained_state`, of what never leaves a client; a layer's buffers are the layer's."""
    if personalization.kind == "local":
        return frozenset(trained_state(model))
    if personalization.kind in ("fedper", "fedrep"):
        head = personalization.head or head_of("", model)
        return frozenset(name for name in trained_state(model) if name.startswith(f"{head}."))
    if personalization.kind == "pfedpara":
        return frozenset(
            f"{path}.{factor}"
            for path, module in model.named_modules()
            if isinstance(module, FactorizedWeight)
            and isinstance(module.factorization, Hadamard)
            and module.factorization.plus_one
            for factor in module.factors
            if factor.endswith("2")
        )
    return frozenset()


def transferred(model: nn.Module, personalization: Personalization = SHARED) -> dict[str, Tensor]:
    """What of `trained_state` travels between server and clients, in both directions."""
    local = local_names(model, personalization)
    return {name: tensor for name, tensor in trained_state(model).items() if name not in local}


def trained_names(model: nn.Module, personalization: Personalization = SHARED) -> list[str]:
    """The names, among those of `transferred`, of what clients train; the others are statistics."""
    local = local_names(model, personalization)
    return [name for name, p in model.named_parameters() if p.requires_grad and name not in local]
