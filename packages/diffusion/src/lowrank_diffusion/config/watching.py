"""What is seen of a run on its way."""

from pydantic import NonNegativeInt, PositiveInt

from lowrank_diffusion.config.section import NumberFromZero, Section


class SampleConfig(Section):
    """Pictures made on the way."""

    prompts: list[str] = []
    negative: str = ""
    every: PositiveInt = 250
    """Steps between two grids; one more comes before the first step and one after the last."""
    steps: PositiveInt = 25
    guidance: NumberFromZero = 5.0
    seed: NonNegativeInt = 0


class TrackConfig(Section):
    """Who else is told."""

    validate_every: PositiveInt = 50
    """Steps between two validation losses, always of the same noise and time steps."""
    tensorboard: bool = False
    wandb: bool = False
    """Weights & Biases, with a login of its own, or without the network where WANDB_MODE is offline."""
    project: str = "lowrank"
    entity: str | None = None
    """Whose it is there; the login's own if not given."""
