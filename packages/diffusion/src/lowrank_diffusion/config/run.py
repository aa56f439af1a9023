"""One fine-tuning run: its sections, and which of their values exclude each other."""

from typing import Annotated

from pydantic import Field, model_validator

from lowrank_diffusion.config.data import DataConfig, PriorConfig
from lowrank_diffusion.config.hub import HubConfig
from lowrank_diffusion.config.loss import LossConfig
from lowrank_diffusion.config.model import AdapterSettings, BaseConfig
from lowrank_diffusion.config.pivotal import PivotalConfig
from lowrank_diffusion.config.section import Section
from lowrank_diffusion.config.train import CacheConfig, TrainConfig
from lowrank_diffusion.config.watching import SampleConfig, TrackConfig


class DiffusionConfig(Section):
    """One fine-tuning run."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] = "adapter"
    """Of the run and of its files: letters, digits, dots and hyphens."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    base: BaseConfig = BaseConfig()
    data: DataConfig = DataConfig()
    adapter: AdapterSettings = AdapterSettings()
    pivotal: PivotalConfig = PivotalConfig()
    train: TrainConfig = TrainConfig()
    loss: LossConfig = LossConfig()
    prior: PriorConfig = PriorConfig()
    cache: CacheConfig = CacheConfig()
    sample: SampleConfig = SampleConfig()
    track: TrackConfig = TrackConfig()
    hub: HubConfig = HubConfig()

    @model_validator(mode="after")
    def _text_is_trained_or_cached(self) -> "DiffusionConfig":
        if self.adapter.text_encoders and self.cache.text != "none":
            raise ValueError("adapter.text_encoders trains what cache.text would keep; set cache.text: none")
        if self.pivotal.token is not None and self.cache.text != "none":
            raise ValueError("pivotal.token trains what cache.text would keep; set cache.text: none")
        return self

    @model_validator(mode="after")
    def _tags_are_embedded_anew(self) -> "DiffusionConfig":
        if (self.data.shuffle_tags or self.data.tag_dropout) and self.cache.text != "none":
            raise ValueError(
                "data.shuffle_tags and data.tag_dropout make a caption new each time; set cache.text: none"
            )
        return self

    @model_validator(mode="after")
    def _averages_fit(self) -> "DiffusionConfig":
        free, averaged = self.train.optimizer == "schedulefree", self.train.ema is not None
        if free and self.train.schedule != "constant":
            raise ValueError(
                "train.optimizer: schedulefree takes the place of a schedule; set train.schedule: constant"
            )
        if free and averaged:
            raise ValueError("train.optimizer: schedulefree averages the factors already; leave train.ema out")
        if free and self.train.scale_weight_norms is not None:
            raise ValueError(
                "train.optimizer: schedulefree keeps points of its own, which train.scale_weight_norms cannot reach; "
                "leave that out"
            )
        if free and self.pivotal.token is not None and self.pivotal.hold_spread:
            raise ValueError(
                "train.optimizer: schedulefree keeps points of its own, which pivotal.hold_spread cannot reach; set "
                "pivotal.hold_spread: 0"
            )
        if (free or averaged) and self.adapter.method == "adalora":
            raise ValueError(
                "adapter.method: adalora changes the factors' shapes, which their average cannot follow; "
                "leave train.ema out and take another optimizer than schedulefree"
            )
        return self

    @model_validator(mode="after")
    def _magnitudes_have_a_place(self) -> "DiffusionConfig":
        if self.adapter.dora and self.adapter.method == "adalora":
            raise ValueError(
                "adapter.dora trains magnitudes, which neither PEFT folders nor kohya files of an adalora have; set "
                "adapter.method: lora, loha or lokr, or leave adapter.dora out"
            )
        if self.adapter.dora and self.base.quantize != "none":
            raise ValueError(
                "adapter.dora takes norms of the base's own weights, which base.quantize rounds; set "
                "base.quantize: none (train.offload saves more memory), or leave adapter.dora out"
            )
        if self.adapter.dora and self.train.scale_weight_norms is not None:
            raise ValueError(
                "adapter.dora changes weights by their magnitudes too, which train.scale_weight_norms does not reach; "
                "leave one out"
            )
        return self

    @model_validator(mode="after")
    def _offloaded_blocks_come_back(self) -> "DiffusionConfig":
        if self.train.offload and self.train.checkpointing != 1:
            raise ValueError(
                "train.offload brings a block back when it is computed again; set train.checkpointing: true"
            )
        if self.train.offload and self.train.compile:
            raise ValueError("train.offload exchanges the weights of what train.compile would compile; leave one out")
        return self

    @model_validator(mode="after")
    def _crops_are_cached_once(self) -> "DiffusionConfig":
        if self.data.crop == "random" and self.cache.latents != "none":
            raise ValueError("data.crop: random cuts anew each time; set cache.latents: none, or data.crop: centre")
        return self
