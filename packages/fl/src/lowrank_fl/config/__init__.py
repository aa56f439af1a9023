"""A federated run as data: every key of a run's YAML file, its type, its bounds and its default."""

from lowrank_fl.config.data import DataConfig, PartitionConfig
from lowrank_fl.config.engine import EngineConfig, Execution
from lowrank_fl.config.federation import (
    AggregationConfig,
    CodecConfig,
    FederationConfig,
    Kind,
    PersonalizationConfig,
    Precision,
    StrategyConfig,
)
from lowrank_fl.config.model import NETWORKS, AdapterConfig, Method, ModelConfig, UpdateConfig
from lowrank_fl.config.run import RunConfig
from lowrank_fl.config.trials import AttackConfig, FailuresConfig, PrivacyConfig

__all__ = [
    "NETWORKS",
    "AdapterConfig",
    "AggregationConfig",
    "AttackConfig",
    "CodecConfig",
    "DataConfig",
    "EngineConfig",
    "Execution",
    "FailuresConfig",
    "FederationConfig",
    "Kind",
    "Method",
    "ModelConfig",
    "PartitionConfig",
    "PersonalizationConfig",
    "Precision",
    "PrivacyConfig",
    "RunConfig",
    "StrategyConfig",
    "UpdateConfig",
]
