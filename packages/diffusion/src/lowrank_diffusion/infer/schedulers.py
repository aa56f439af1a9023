"""diffusers' schedulers by short names."""

import inspect
from dataclasses import dataclass, field
from typing import Any

from lowrank_core.errors import UsageError
from lowrank_diffusion.config import LossConfig
from lowrank_diffusion.infer.sources import Base
from lowrank_diffusion.single_file import Learned


@dataclass(frozen=True)
class Sampler:
    """A scheduler of diffusers with its options, and what A1111 calls it."""

    kind: str
    title: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])


SAMPLERS = {
    "ddim": Sampler("DDIMScheduler", "DDIM"),
    "ddpm": Sampler("DDPMScheduler", "DDPM"),
    "dpm++": Sampler("DPMSolverMultistepScheduler", "DPM++ 2M"),
    "dpm++-karras": Sampler("DPMSolverMultistepScheduler", "DPM++ 2M Karras", {"use_karras_sigmas": True}),
    "dpm++-sde": Sampler("DPMSolverMultistepScheduler", "DPM++ 2M SDE", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": Sampler("EulerDiscreteScheduler", "Euler"),
    "euler-a": Sampler("EulerAncestralDiscreteScheduler", "Euler a"),
    "heun": Sampler("HeunDiscreteScheduler", "Heun"),
    "lcm": Sampler("LCMScheduler", "LCM"),
    "unipc": Sampler("UniPCMultistepScheduler", "UniPC"),
}


def check_scheduler(name: str | None) -> None:
    """Raise a UsageError for a name that `make_scheduler` does not know."""
    if name is not None and name not in SAMPLERS:
        raise UsageError(f"--scheduler is one of {', '.join(SAMPLERS)}, got {name!r}")


def make_scheduler(own: Any, name: str | None, trained: Base | LossConfig | Learned) -> Any:
    """The scheduler of that name, or the base's own if None, over the base's noise schedule.

    Where a run was trained to predict something else than its base did, or with a rescaled schedule, so is it sampled
    from, with time steps that start at the last (Lin et al., 2023, https://arxiv.org/abs/2305.08891). Where the base's
    own scheduler cannot follow such a schedule, DDIM stands in, which is that paper's.

    Args:
        own: the base's scheduler.
        name: a key of `SAMPLERS`.
        trained: what the adapters predict, or the file of a whole model.

    Raises:
        UsageError: a name that is unknown, or of a scheduler that cannot follow a rescaled schedule.
    """
    check_scheduler(name)
    rescaled = trained.zero_terminal_snr or own.config.get("rescale_betas_zero_snr", False)
    if name is None and rescaled and not _rescales(type(own)):
        name = "ddim"
    kind: Any = type(own)
    options: dict[str, Any] = {}
    if name is not None:
        import diffusers

        sampler = SAMPLERS[name]
        kind, options = getattr(diffusers, sampler.kind), dict(sampler.options)
    if trained.prediction is not None:
        options["prediction_type"] = trained.prediction
    if rescaled and not _rescales(kind):
        raise UsageError(
            f"{kind.__name__} cannot follow a schedule that ends in pure noise, which this base or run has; "
            "choose --scheduler ddim, euler or dpm++"
        )
    if trained.zero_terminal_snr:
        options |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return kind.from_config(own.config, **options)


def _rescales(kind: type) -> bool:
    """Whether schedulers of this kind know schedules that end in pure noise."""
    return "rescale_betas_zero_snr" in inspect.signature(kind).parameters


def title_of(name: str | None, own: Any) -> str:
    """What A1111 calls the scheduler; the class's own name where it has none."""
    if name is not None:
        return SAMPLERS[name].title
    kind = type(own).__name__
    return next((each.title for each in SAMPLERS.values() if each.kind == kind), kind)
