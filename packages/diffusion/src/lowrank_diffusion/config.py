"""A fine-tuning run as data: every key of a run's YAML file, its type, its bounds and its default."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
NumberFromZero = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Pixels = Annotated[int, Field(ge=16, multiple_of=8)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class BaseConfig(Section):
    """What is fine-tuned."""

    path: str = "tiny"
    """A diffusers folder or hub id of an SDXL, or `tiny`, which is shipped with this package."""
    vae: str | None = None
    """A VAE of its own, as folder or hub id; SDXL's is not fit for fp16."""
    revision: str | None = None
    """Of the hub's repository."""


class DataConfig(Section):
    """Which captioned pictures, and how they are cut."""

    path: str = "quickstart"
    """A folder of pictures with .txt captions or metadata.jsonl, a folder or file of parquet, a hub id; or
    `quickstart`, pictures that this package draws."""
    image_key: str | None = None
    caption_key: str | None = None
    """The columns; found by their types when not given."""
    caption: str | None = None
    """One caption for every picture that has none."""
    trigger: Annotated[str, Field(pattern=r"\S")] | None = None
    """A word for what is learned: it stands for `[trigger]` in captions, and before those that lack both."""
    caption_templates: list[str] = []
    """Texts around `{caption}`, one of which is drawn for each example."""
    shuffle_tags: bool = False
    """Captions are tags between commas, which are put in another order each time."""
    keep_tags: NonNegativeInt = 0
    """So many of the first stay where they are."""
    tag_dropout: Share = 0.0
    """The chance of each of the others to be left out."""
    resolution: Pixels = 1024
    """Pictures have about so many pixels squared, whatever their shape."""
    buckets: bool = True
    """Keep each picture near its own shape; off, all are square."""
    bucket_step: Pixels = 64
    """Sides are multiples of this."""
    max_aspect: Annotated[float, Field(ge=1)] = 2.0
    """The longer side is at most so many times the shorter."""
    crop: Literal["centre", "random"] = "centre"
    flip: Fraction = 0.0
    """The chance that a picture is mirrored."""
    mask: Literal["none", "alpha", "file"] = "none"
    """What counts in the loss: what is opaque, or what is white in `a-masklabel.png` beside `a.jpg`."""
    unmasked_weight: Fraction = 0.0
    """How much the rest counts."""
    background: str = "white"
    """What lies behind transparent pictures: a colour's name or #rrggbb."""
    repeats: PositiveInt = 1
    """How often an epoch shows each picture."""
    caption_dropout: Fraction = 0.1
    """The chance that a caption is left out, which guidance needs."""
    dropped_caption: Literal["zeros", "empty"] = "zeros"
    """What stands for it: zeros, as diffusers' pipeline has it, or the encoded empty text, as ComfyUI has it."""
    held_out: Share = 0.1
    """The share of pictures kept for the validation loss; at least one where above 0."""
    tolerated_broken: Fraction = 0.0
    """The share of pictures that may be unreadable; they are named and left out."""
    max_images: PositiveInt | None = None
    """Only the first so many after a seeded shuffle."""

    @model_validator(mode="after")
    def _templates_hold_the_caption(self) -> "DataConfig":
        for template in self.caption_templates:
            if "{caption}" not in template:
                raise ValueError(
                    f"caption_templates: {template!r} does not say where the caption goes; add {{caption}}"
                )
        return self


class AdapterSettings(Section):
    """What is trained in place of the weights."""

    method: Literal["lora", "loha", "lokr", "adalora"] = "loha"
    rank: PositiveInt = 8
    alpha: PositiveFloat = 8.0
    target: list[str] | str = ["to_q", "to_k", "to_v", "to_out.0"]
    """The UNet's layers: name suffixes, a regular expression, or `all-linear`."""
    rank_pattern: dict[str, PositiveInt] = {}
    alpha_pattern: dict[str, PositiveFloat] = {}
    """A rank and an alpha of their own for layers whose names end in a match of the key, a regular expression."""
    dropout: Share = 0.0
    """Of the adapter's input."""
    rank_dropout: Share = 0.0
    """Of whole outputs of an adapter."""
    module_dropout: Share = 0.0
    """The chance that a layer goes without its adapter for one forward."""
    factor: Annotated[int, Field(ge=-1)] = -1
    """LoKr: the size of the smaller Kronecker side; -1 takes the two sides as alike as can be."""
    target_rank: PositiveInt | None = None
    """AdaLoRA: the mean rank at the end; half of `rank` when not given."""
    text_encoders: bool = False
    """Train an adapter on both text encoders too."""
    text_target: list[str] | str = ["q_proj", "k_proj", "v_proj", "out_proj"]
    init_from: str | None = None
    """Go on from the adapter in this PEFT folder or file."""


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
    checkpointing: bool = False
    """Recompute activations in the backward pass."""
    compile: bool = False
    """Compile the UNet's repeated blocks."""
    device: str = "auto"
    processes: PositiveInt = 1
    """Processes on this machine, each with a device of its own."""
    checkpoint_every: PositiveInt = 250
    keep_checkpoints: PositiveInt = 2
    loss_limit: PositiveFloat = 10.0
    """Training stops where the mean loss of twenty steps lies above this."""


class LossConfig(Section):
    """What a step makes smaller."""

    prediction: Literal["epsilon", "v_prediction"] | None = None
    """The scheduler's own if not given."""
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
    """Rescale the schedule so that its last step is pure noise (Lin et al., 2023); for v-prediction."""

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


class PriorConfig(Section):
    """Pictures of the subject's class, which keep it as the base draws it (DreamBooth; Ruiz et al., 2022)."""

    caption: str | None = None
    """Of the class, such as `a photo of a dog`; without one there are no class pictures."""
    path: str | None = None
    """Their folder; what it lacks of `images` the base draws, into it."""
    images: PositiveInt = 100
    weight: PositiveFloat = 1.0
    """How often their loss counts."""
    steps: PositiveInt = 25
    guidance: NumberFromZero = 5.0
    """As they are drawn."""

    @model_validator(mode="after")
    def _has_a_folder(self) -> "PriorConfig":
        if self.caption is not None and self.path is None:
            raise ValueError("caption is given, but no path; name a folder for pictures of the class")
        return self


class CacheConfig(Section):
    """What is computed once."""

    latents: Literal["none", "memory", "disk"] = "memory"
    text: Literal["none", "memory", "disk"] = "memory"
    folder: str | None = None
    """Of the cache on disk; a folder in lowrank's own cache if not given."""


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


class DiffusionConfig(Section):
    """One fine-tuning run."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] = "adapter"
    """Of the run and of its files: letters, digits, dots and hyphens."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    base: BaseConfig = BaseConfig()
    data: DataConfig = DataConfig()
    adapter: AdapterSettings = AdapterSettings()
    train: TrainConfig = TrainConfig()
    loss: LossConfig = LossConfig()
    prior: PriorConfig = PriorConfig()
    cache: CacheConfig = CacheConfig()
    sample: SampleConfig = SampleConfig()
    track: TrackConfig = TrackConfig()

    @model_validator(mode="after")
    def _text_is_trained_or_cached(self) -> "DiffusionConfig":
        if self.adapter.text_encoders and self.cache.text != "none":
            raise ValueError("adapter.text_encoders trains what cache.text would keep; set cache.text: none")
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
        if (free or averaged) and self.adapter.method == "adalora":
            raise ValueError(
                "adapter.method: adalora changes the factors' shapes, which their average cannot follow; "
                "leave train.ema out and take another optimizer than schedulefree"
            )
        return self

    @model_validator(mode="after")
    def _crops_are_cached_once(self) -> "DiffusionConfig":
        if self.data.crop == "random" and self.cache.latents != "none":
            raise ValueError("data.crop: random cuts anew each time; set cache.latents: none, or data.crop: centre")
        return self
