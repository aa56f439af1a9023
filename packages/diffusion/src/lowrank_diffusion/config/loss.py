"""What a step makes smaller."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from lowrank_diffusion.config.section import NumberFromZero, Section


class LossConfig(Section):
    """What a step makes smaller."""

    prediction: Literal["epsilon", "v_prediction"] | None = None
    """The base's own if not given: as its scheduler says, or a single file's marks."""
    type: Literal["l2", "huber", "smooth_l1"] = "l2"
    """Squares, or pseudo-Huber errors, which large differences weigh less in (Khrapov et al., 2024)."""
    huber_c: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Where the pseudo-Huber errors turn from squares to absolute values."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    """How that falls from 1 to `huber_c` as steps become noisier."""
    min_snr_gamma: PositiveFloat | None = None
    """Min-SNR weighting (Hang et al., 2023); the paper's value is 5."""
    debiased: bool = False
    """Weighting by 1 / √SNR (Yu et al., 2023)."""
    noise_offset: NumberFromZero = 0.0
    """A common shift of each channel's noise."""
    multires_noise: Annotated[int, Field(ge=0, le=10)] = 0
    """Coarser and coarser layers that the noise is made of (Whitaker, 2023)."""
    multires_discount: Annotated[float, Field(gt=0, le=1)] = 0.3
    """How much each of them has of the one before."""
    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    """How time steps are drawn; `logit_normal` is σ(mean + std z) for a normal z (Esser et al., 2024)."""
    timestep_mean: float = 0.0
    timestep_std: PositiveFloat = 1.0
    """Of the logit-normal; a mean above 0 draws noisier steps more often."""
    min_timestep: NonNegativeInt = 0
    max_timestep: PositiveInt | None = None
    """Only time steps from the first to before the second; the base's last one if not given."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that its last step is pure noise (Lin et al., 2023); for v-prediction. A base that has
    such a schedule keeps it either way."""

    @model_validator(mode="after")
    def _zero_snr_predicts_v(self) -> "LossConfig":
        if self.zero_terminal_snr and self.prediction != "v_prediction":
            raise ValueError("zero_terminal_snr needs prediction: v_prediction, because pure noise tells nothing of it")
        return self

    @model_validator(mode="after")
    def _choices_that_exclude_each_other(self) -> "LossConfig":
        if self.debiased and self.min_snr_gamma is not None:
            raise ValueError("debiased and min_snr_gamma both weigh time steps; leave one of them out")
        if self.noise_offset and self.multires_noise:
            raise ValueError("noise_offset and multires_noise both shift whole areas; set one of them to 0")
        if self.max_timestep is not None and self.max_timestep <= self.min_timestep:
            raise ValueError(f"max_timestep is {self.max_timestep}, not above min_timestep, {self.min_timestep}")
        return self
