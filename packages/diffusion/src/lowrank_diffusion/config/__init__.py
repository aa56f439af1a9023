"""A fine-tuning run as data: every key of a run's YAML file, its type, its bounds and its default."""

from lowrank_diffusion.config.data import DataConfig, PriorConfig
from lowrank_diffusion.config.hub import HubConfig
from lowrank_diffusion.config.loss import LossConfig
from lowrank_diffusion.config.model import AdapterSettings, BaseConfig
from lowrank_diffusion.config.pivotal import PivotalConfig
from lowrank_diffusion.config.run import DiffusionConfig
from lowrank_diffusion.config.train import CacheConfig, TrainConfig
from lowrank_diffusion.config.watching import SampleConfig, TrackConfig

__all__ = [
    "AdapterSettings",
    "BaseConfig",
    "CacheConfig",
    "DataConfig",
    "DiffusionConfig",
    "HubConfig",
    "LossConfig",
    "PivotalConfig",
    "PriorConfig",
    "SampleConfig",
    "TrackConfig",
    "TrainConfig",
]
