"""A whole run: its sections, and what of them goes together."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from lowrank_core.errors import shortened
from lowrank_fl.config.data import DataConfig, PartitionConfig
from lowrank_fl.config.engine import EngineConfig
from lowrank_fl.config.federation import (
    AggregationConfig,
    CodecConfig,
    FederationConfig,
    Kind,
    PersonalizationConfig,
    StrategyConfig,
)
from lowrank_fl.config.fits_execution import execution_fault
from lowrank_fl.config.fits_federation import aggregation_fits, enough_clients, personalization_fits, plain_steps
from lowrank_fl.config.fits_model import adapter_fits, ranks_fit, update_fits
from lowrank_fl.config.fits_privacy import privacy_holds
from lowrank_fl.config.model import AdapterConfig, ModelConfig, UpdateConfig
from lowrank_fl.config.section import Section
from lowrank_fl.config.trials import AttackConfig, FailuresConfig, PrivacyConfig


def check_path_name(name: str) -> str:
    """The name, which is to be a folder's on this machine and others; raises ValueError where it is not fit for it."""
    if not re.fullmatch(r"(?!\.+$)[A-Za-z0-9._-]+", name):
        found = shortened(repr(name))
        raise ValueError(f"becomes a folder's name and takes letters, digits, '.', '_' and '-' alone, got {found}")
    return name


class RunConfig(Section):
    """One federated run, or a sweep of runs."""

    name: Annotated[str, AfterValidator(check_path_name)] = "run"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    rounds: PositiveInt = 16
    device: str = "cpu"
    data: DataConfig = DataConfig()
    partition: PartitionConfig = PartitionConfig()
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    update: UpdateConfig = UpdateConfig()
    federation: FederationConfig = FederationConfig()
    strategy: StrategyConfig = StrategyConfig()
    personalization: PersonalizationConfig = PersonalizationConfig()
    aggregation: AggregationConfig = AggregationConfig()
    codec: CodecConfig = CodecConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    failures: FailuresConfig = FailuresConfig()
    attack: AttackConfig = AttackConfig()
    engine: EngineConfig = EngineConfig()
    sweep: dict[str, list[Any]] = Field(default={})
    """Dotted keys and the values each takes; the runs are every combination."""

    @property
    def method(self) -> str:
        """What is trained, in one word: the adapter's method, `KIND-update`, else the network's."""
        if self.update.kind != "none":
            return f"{self.update.kind}-update"
        return self.adapter.method or self.model.method

    @property
    def personalized(self) -> Kind:
        """`personalization.kind`, or what it means where it is not given."""
        if self.personalization.kind is not None:
            return self.personalization.kind
        return "pfedpara" if self.model.method == "pfedpara" and self.partition.held_out else "none"

    @property
    def test_epochs(self) -> int:
        """`personalization.test_epochs`, or what it means where it is not given."""
        own = self.personalization
        if own.test_epochs is not None:
            return own.test_epochs
        return (own.epochs or self.federation.epochs) if own.kind == "finetune" else 0

    @model_validator(mode="after")
    def _fits(self) -> "RunConfig":
        for check in (personalization_fits, adapter_fits, update_fits, ranks_fit, aggregation_fits, privacy_holds):
            check(self)
        plain_steps(self)
        found = execution_fault(self, self.engine.execution)
        if found:
            raise ValueError(found)
        enough_clients(self)
        return self
