"""The files of a trained adapter, for every program that may want it."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from lowrank_core.files import adapter_file_of, write
from lowrank_core.files.bundle import Component, Layers
from lowrank_core.files.model import layers_of_model
from lowrank_core.files.tensors import write_bytes, write_tensors
from lowrank_diffusion.adapting import Adapters
from lowrank_diffusion.card import model_card
from lowrank_diffusion.config import DiffusionConfig
from lowrank_diffusion.families import Family
from lowrank_diffusion.material import Material
from lowrank_diffusion.noise import TrainingNoise
from lowrank_diffusion.published import without_folders
from lowrank_diffusion.results import RunSummary
from lowrank_diffusion.words import word_file


def write_outputs(
    run: Path,
    config: DiffusionConfig,
    adapters: Adapters,
    material: Material,
    summary: RunSummary,
    noise: TrainingNoise,
    family: Family,
    note: Callable[[str], None],
) -> None:
    """PEFT folders, the single file of ComfyUI and kohya's tools, the equal LoRA for diffusers, and the model card.

    Of the first, none where PEFT has no form for the adapter. A word's embeddings are a file of their own, which
    ComfyUI and A1111 read as an SDXL embedding.

    Each file is replaced whole.

    Raises:
        LowrankError: the disk is full, or the factors are not finite.
    """
    about = metadata(config, material, summary, noise)
    files = {place: adapter_file_of(network) for place, network in adapters.networks.items()}
    layers: dict[Component, Layers] = {
        files[place].component: layers_of_model(network) for place, network in adapters.networks.items()
    }
    if config.adapter.in_peft:
        for place, file in files.items():
            write([file], run / place, "peft", layers, overwrite=True)
    described = [replace(file, metadata=about) for file in files.values()]
    write(described, run / f"{config.name}.safetensors", "kohya", layers, overwrite=True)
    if config.adapter.method == "lokr":
        # The product of both sides' ranks is mostly the layer's own.
        source = run / ("unet" if config.adapter.in_peft else f"{config.name}.safetensors")
        note(
            "no file of an equal LoRA is written, since LoKr's would be nearly as large as the model; make one with "
            f"lowrank convert {source} FILE --to diffusers"
        )
    else:
        write(list(files.values()), run / f"{config.name}_lora.safetensors", "diffusers", layers, overwrite=True)
    if adapters.word is not None:
        said = {key: value for key, value in about.items() if key.startswith("modelspec.")}
        said |= {"modelspec.architecture": "stable-diffusion-xl-v1-base/textual-inversion"}
        said |= {"modelspec.sai_model_spec": "1.0.1", "modelspec.trigger_phrase": adapters.word.text}
        write_tensors(run / word_file(config.name), adapters.word.vectors, said)
    write_bytes(run / "README.md", model_card(run, config, summary, list(files), noise, family).encode())


def metadata(
    config: DiffusionConfig, material: Material, summary: RunSummary, noise: TrainingNoise
) -> Mapping[str, str]:
    """What kohya's tools, ComfyUI's and A1111's model managers show of a file, beside what its format needs."""
    train, data = config.train, config.data
    trigger = data.trigger or config.pivotal.token
    captions = Counter(material.pictures[number].caption for number in material.trained)
    entries: dict[str, object] = {
        "modelspec.title": config.name,
        "modelspec.resolution": f"{data.resolution}x{data.resolution}",
        "modelspec.prediction_type": "v" if noise.prediction == "v_prediction" else "epsilon",
        **({} if trigger is None else {"modelspec.trigger_phrase": trigger}),
        "ss_output_name": config.name,
        "ss_sd_model_name": without_folders(config.base.path),
        "ss_resolution": f"({data.resolution}, {data.resolution})",
        "ss_enable_bucket": data.buckets,
        "ss_num_train_images": len(material.trained) * data.repeats,
        "ss_num_reg_images": 0 if config.prior.caption is None else config.prior.images,
        "ss_prior_loss_weight": config.prior.weight,
        "ss_steps": summary.steps,
        "ss_max_train_steps": train.steps,
        "ss_total_batch_size": material.batches.size,
        "ss_learning_rate": train.lr,
        "ss_unet_lr": train.lr,
        "ss_text_encoder_lr": (train.text_lr or train.lr) if config.adapter.text_encoders else None,
        "ss_optimizer": train.optimizer,
        "ss_lr_scheduler": train.schedule,
        "ss_lr_warmup_steps": train.warmup,
        "ss_max_grad_norm": train.clip,
        "ss_mixed_precision": {"fp32": "no"}.get(train.precision, train.precision),
        "ss_scale_weight_norms": train.scale_weight_norms,
        "ss_masked_loss": data.mask != "none",
        "ss_min_snr_gamma": config.loss.min_snr_gamma,
        "ss_debiased_estimation": config.loss.debiased,
        "ss_loss_type": config.loss.type,
        "ss_huber_schedule": config.loss.huber_schedule,
        "ss_huber_c": config.loss.huber_c,
        "ss_noise_offset": config.loss.noise_offset,
        "ss_multires_noise_iterations": config.loss.multires_noise,
        "ss_multires_noise_discount": config.loss.multires_discount,
        "ss_v_parameterization": noise.prediction == "v_prediction",
        "ss_zero_terminal_snr": noise.zero_terminal_snr,
        "ss_shuffle_caption": data.shuffle_tags,
        "ss_keep_tokens": data.keep_tags,
        "ss_caption_tag_dropout_rate": data.tag_dropout,
        "ss_caption_dropout_rate": data.caption_dropout,
        "ss_seed": config.seed,
        "ss_tag_frequency": json.dumps({Path(data.path).name: captions}),
    }
    return {key: str(value) for key, value in entries.items()}
