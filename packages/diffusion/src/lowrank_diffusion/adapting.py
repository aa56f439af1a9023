"""The adapters of a run, put on the networks of its base."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_core import AdaLoRA, LoHa, LoKr, LoRA
from lowrank_core.adapters.config import AdapterConfig
from lowrank_core.adapters.control import adapters_of, configs_of, trainable_parameters
from lowrank_core.adapters.inject import inject
from lowrank_core.adapters.targets import by_pattern, find_targets
from lowrank_core.adapters.tensors import load_state_dict_into, state_dict_of
from lowrank_core.adaptive import AdaptiveRank, RankAllocator, adapt_ranks
from lowrank_core.errors import LowrankError, UsageError
from lowrank_core.files import load
from lowrank_diffusion.config import AdapterSettings, DiffusionConfig
from lowrank_diffusion.infer.sources import sources_of
from lowrank_diffusion.pivotal import NewWord, new_word
from lowrank_diffusion.seeds import derive_seed

PLACES = {"unet": "unet", "text_encoder_one": "text_encoder", "text_encoder_two": "text_encoder_2"}
"""The adapters' folders in a run, and the networks' names in diffusers' pipeline."""


def adapter_config(settings: AdapterSettings, target: Sequence[str] | str) -> AdapterConfig:
    """What `lowrank_core.inject` takes; `target` is `settings.target` or `settings.text_target`.

    Raises:
        UsageError: values that do not go together, such as a target rank above the rank.
    """
    common: dict[str, Any] = {
        "rank": settings.rank,
        "alpha": settings.alpha,
        "target_modules": target,
        "rank_pattern": settings.rank_pattern,
        "alpha_pattern": settings.alpha_pattern,
        "dropout": settings.dropout,
        "rank_dropout": settings.rank_dropout,
        "module_dropout": settings.module_dropout,
        # As PEFT, diffusers and newer LyCORIS have it.
        "weight_decompose": "out" if settings.dora else None,
    }
    if settings.method == "lokr":
        return LoKr(**common, factor=settings.factor)
    if settings.method == "adalora":
        return AdaLoRA(**common, target_rank=final_rank(settings))
    return LoHa(**common) if settings.method == "loha" else LoRA(**common)


def final_rank(settings: AdapterSettings) -> int:
    """AdaLoRA's mean rank at the end of the run."""
    return settings.target_rank or max(1, settings.rank // 2)


def networks_of(pipeline: Any, settings: AdapterSettings) -> dict[str, nn.Module]:
    """What gets an adapter, by `PLACES`."""
    places = list(PLACES) if settings.text_encoders else ["unet"]
    # Stable Diffusion 1 has one text encoder.
    return {place: getattr(pipeline, PLACES[place]) for place in places if hasattr(pipeline, PLACES[place])}


def check_targets(networks: Mapping[str, nn.Module], settings: AdapterSettings) -> None:
    """Refuse targets that are none, and ranks that no layer with them has a use for.

    LoKr's may be any: from a size on its second side is a whole matrix.

    Args:
        networks: `unet` and text encoders; meta weights will do.
        settings: of the adapter.

    Raises:
        UsageError: so it is; fields are called by their keys.
    """
    largest = dict[int, tuple[int, str]]()
    for place, network in networks.items():
        key = "target" if place == "unet" else "text_target"
        try:
            targets = find_targets(network, adapter_config(settings, getattr(settings, key)))
        except UsageError as error:
            said = re.sub("^target_modules", f"adapter.{key}", str(error))
            said = re.sub("^(rank_pattern|alpha_pattern)", r"adapter.\1", said)
            raise UsageError(said.replace("with exclude_modules", f"of adapter.{key}")) from None
        for target in targets:
            found = min(target.geometry.matrix_shape), target.name
            largest[target.rank] = max(largest.get(target.rank, found), found, key=lambda each: each[0])
    for rank, (limit, name) in largest.items():
        if rank > limit and settings.method != "lokr":
            option = f"adapter.rank{'' if rank == settings.rank else '_pattern'}"
            raise UsageError(
                f"{option} has {rank}, and the largest rank that any of its layers has a use for is {limit} ({name}); "
                "give that, or less"
            )


def put_adapters(pipeline: Any, config: DiffusionConfig, note: Callable[[str], None]) -> "Adapters":
    """Adapters on the UNet and, if asked for, on the text encoders, drawn from the run's seed; all else is frozen.

    A new word comes beside them where `pivotal` has one.

    Raises:
        LowrankError: `adapter.init_from` cannot be read, is for another model or a run that has no adapter yet.
        UsageError: targets that match nothing, an adapter to go on from of another method, or with magnitudes where
            none are wanted or the other way round, or what `new_word` raises.
    """
    word = new_word(config, pipeline)
    settings = config.adapter
    source = None if settings.init_from is None else sources_of([Path(settings.init_from)], note)[0].path
    networks = networks_of(pipeline, settings)
    for number, (place, network) in enumerate(networks.items()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "adapter", number))
            wanted = adapter_config(settings, settings.target if place == "unet" else settings.text_target)
            if source is None:
                inject(network, wanted)
            else:
                _go_on_from(source, place, network, wanted, note)
    return Adapters(networks, word)


def _go_on_from(
    source: Path, place: str, network: nn.Module, wanted: AdapterConfig, note: Callable[[str], None]
) -> None:
    try:
        load(network, source)
    except LowrankError as error:
        if place == "unet":
            raise
        note(f"the adapter of {place} starts anew: {error}")
        inject(network, wanted)
    config = configs_of(network)["default"]
    if config.method != wanted.method:
        raise UsageError(
            f"adapter.init_from is {source}, which holds {config.method}, but adapter.method is {wanted.method}; "
            f"set adapter.method: {config.method}"
        )
    if config.weight_decompose == "in":
        raise UsageError(
            f"adapter.init_from is {source}, which has DoRA's magnitudes along the inputs, and training has them along "
            "the outputs; merge it into the base, and train on that"
        )
    if config.weight_decompose != wanted.weight_decompose:
        has, is_ = ("has", "true") if config.weight_decompose else ("has none of", "false")
        raise UsageError(f"adapter.init_from is {source}, which {has} DoRA's magnitudes; set adapter.dora: {is_}")


class Adapters:
    """What is trained: the networks that carry adapters, by `PLACES`, and a word beside them, if there is one."""

    def __init__(self, networks: Mapping[str, nn.Module], word: NewWord | None = None) -> None:
        self.networks, self.word = dict(networks), word

    @property
    def unet(self) -> nn.Module:
        return self.networks["unet"]

    @property
    def text_places(self) -> list[str]:
        """Of both text encoders, where they are trained."""
        return [place for place in self.networks if place != "unet"]

    def parameters(self, place: str) -> list[nn.Parameter]:
        return trainable_parameters(self.networks[place])

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Everything trained, as `<place>.<name in the network>` and `word.<encoder>`."""
        return {
            f"{place}.{name}": parameter
            for place, network in self.networks.items()
            for name, parameter in network.named_parameters()
            if parameter.requires_grad
        } | {f"word.{part}": vectors for part, vectors in self._vectors.items()}

    @property
    def _vectors(self) -> Mapping[str, nn.Parameter]:
        return {} if self.word is None else self.word.vectors

    @property
    def magnitudes(self) -> list[nn.Parameter]:
        """DoRA's, which start as the norms of the base's weights and not at zero."""
        return [
            adapter.magnitude
            for network in self.networks.values()
            for adapter in adapters_of(network).values()
            if adapter.decompose is not None
        ]

    def rate_factors(self, patterns: Mapping[str, float]) -> dict[nn.Parameter, float]:
        """What `train.lr_pattern` multiplies each parameter's rate with; layers are named as `<place>.<layer>`.

        Raises:
            UsageError: a key matches no adapted layer, or is no regular expression.
        """
        names = [f"{place}.{layer}" for place, network in self.networks.items() for layer in adapters_of(network)]
        factors = by_pattern(names, patterns, "train.lr_pattern")
        return {
            parameter: factors.get(name.partition(".adapters.")[0], 1.0)
            for name, parameter in self.named_parameters().items()
        }

    @torch.no_grad()
    def limit_norms(self, limit: float) -> None:
        """Scale every change of a weight, scaling included, down to this Frobenius norm where it is larger.

        Max-norm regularisation (Srivastava et al., 2014) as sd-scripts' scale_weight_norms has it. All methods compose
        the change linearly from each factor, so each of n factors takes the n-th root of the ratio; of AdaLoRA's, whose
        other two are to stay orthogonal, the values take it all.
        """
        for network in self.networks.values():
            for adapter in adapters_of(network).values():
                ratio = (limit / adapter.compose().norm()).clamp(max=1)
                factors = adapter.factors
                scaled = [factors["lora_E"]] if "lora_E" in factors else list(factors.values())
                for factor in scaled:
                    factor *= ratio ** (1 / len(scaled))

    @property
    def size(self) -> int:
        """Numbers that are trained."""
        return sum(parameter.numel() for parameter in self.named_parameters().values())

    def adapt_ranks(self, optimizer: Optimizer, settings: AdapterSettings, steps: int) -> RankAllocator | None:
        """Let AdaLoRA's ranks fall while the optimizer steps; None for other methods.

        Raises:
            UsageError: a run too short for the schedule.
        """
        if settings.method != "adalora":
            return None
        config = AdaptiveRank(target_rank=final_rank(settings))
        return adapt_ranks(optimizer, nn.ModuleDict(self.networks), steps, config)

    def state(self) -> dict[str, Tensor]:
        """All factors, as `<place>/<layer>.<factor>`, and a word's vectors, `word/<encoder>`; detached, not copied."""
        return {
            f"{place}/{name}": tensor
            for place, network in self.networks.items()
            for name, tensor in state_dict_of(network).items()
        } | {f"word/{part}": vectors.detach() for part, vectors in self._vectors.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill the adapters with what `state` gave.

        Raises:
            LowrankError: tensors are missing, unexpected or of another shape.
        """
        for place, network in self.networks.items():
            own = {name.removeprefix(f"{place}/"): t for name, t in tensors.items() if name.startswith(f"{place}/")}
            load_state_dict_into(network, own)
        for part, vectors in self._vectors.items():
            found = tensors.get(f"word/{part}")
            if found is None or found.shape != vectors.shape:
                raise LowrankError(f"the checkpoint has no {part} for the word {self.word}; start the run again")
            vectors.data.copy_(found)

    def train(self, mode: bool) -> None:
        """Dropout on or off."""
        for network in self.networks.values():
            network.train(mode)
