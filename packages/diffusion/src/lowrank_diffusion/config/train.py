"""How it is trained, and what is computed once."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from lowrank_diffusion.config.section import NumberFromZero, OnOrNumber, Section


class TrainConfig(Section):
    """How."""

    steps: PositiveInt = 1000
    """Optimizer steps."""
    batch_size: PositiveInt = 1
    """Pictures of one process in one forward."""
    accumulate: PositiveInt = 1
    """Forwards of one optimizer step."""
    lr: PositiveFloat = 1e-4
    text_lr: PositiveFloat | None = None
    """Of the text encoders' adapters; `lr` if not given."""
    lr_pattern: dict[str, PositiveFloat] = {}
    """What the rate is multiplied with in layers whose names end in a match of the key, a regular expression."""
    optimizer: Literal["adamw", "adamw8bit", "prodigy", "adafactor", "lion", "schedulefree"] = "adamw"
    weight_decay: NumberFromZero = 1e-2
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup: NonNegativeInt = 0
    """Steps over which the rate rises from nothing."""
    clip: NumberFromZero = 1.0
    """Largest norm of all gradients together; 0 does not clip."""
    scale_weight_norms: PositiveFloat | None = None
    """After each step, changes of a layer's weight with a larger Frobenius norm are scaled down to this one."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a running average of the factors, which is then what is validated, sampled and saved."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the frozen base and of products; factors are fp32."""
    checkpointing: OnOrNumber = False
    """Recompute activations in the backward pass: of all blocks, or of every n-th one of the UNet's."""
    offload: OnOrNumber = False
    """Keep the frozen weights of all the UNet's blocks, or of the n largest, in the CPU's memory while not in use."""
    compile: bool = False
    """Compile the UNet's repeated blocks."""
    device: str = "auto"
    processes: PositiveInt = 1
    """Processes on this machine, each with a device of its own."""
    checkpoint_every: PositiveInt = 250
    keep_checkpoints: PositiveInt = 2
    loss_limit: PositiveFloat = 10.0
    """Training stops where the mean loss of twenty steps lies above this."""


class CacheConfig(Section):
    """What is computed once."""

    latents: Literal["none", "memory", "disk"] = "memory"
    text: Literal["none", "memory", "disk"] = "memory"
    folder: str | None = None
    """Of the cache on disk; a folder in lowrank's own cache if not given."""
