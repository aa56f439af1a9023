"""A run's README.md: what was trained, on what, and how each of its files is loaded."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from lowrank_diffusion.base_files import HUB_ID
from lowrank_diffusion.config import DiffusionConfig
from lowrank_diffusion.families import SD1, SDXL, Family
from lowrank_diffusion.noise import TrainingNoise
from lowrank_diffusion.published import published
from lowrank_diffusion.results import RunSummary
from lowrank_diffusion.words import PARTS, word_file

_LICENCES = {SDXL.repository: "openrail++", SD1.repository: "creativeml-openrail-m"}
"""Of bases whose licence is for what is made of them too."""
_METHODS = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "adalora": "AdaLoRA"}


def model_card(
    run: Path,
    config: DiffusionConfig,
    summary: RunSummary,
    places: Sequence[str],
    noise: TrainingNoise,
    family: Family,
) -> str:
    """Markdown, with the fields at its head that the Hugging Face hub reads.

    Args:
        run: the folder it is for, whose latest grid of samples it shows.
        config: of the run.
        summary: of the run.
        places: the networks with adapters, and the PEFT folders where PEFT has a form for them.
        noise: what it was trained to predict, and over which schedule.
        family: of the base.
    """
    method, tree = _METHODS[config.adapter.method] + (" with DoRA" if config.adapter.dora else ""), published(config)
    base, data = tree["base"]["path"], tree["data"]["path"]
    grid = _latest_grid(run)
    fields = {
        **_licence(config),
        # The hub takes no other name here than its own.
        **({"base_model": base} if _is_on_hub(config.base.path) else {}),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": [family.tag, "text-to-image", "diffusers", "lowrank", *config.adapter.described.split("+")],
    }
    prompt = config.data.trigger or config.pivotal.token or next(iter(config.sample.prompts), None)
    if prompt is not None:
        fields["instance_prompt"] = prompt
    if grid is not None:
        # What the hub shows above the card.
        fields["widget"] = [{"text": " | ".join(config.sample.prompts), "output": {"url": f"samples/{grid.name}"}}]
    sections = [
        f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n",
        f"# {config.name}\n",
        f"{method} of rank {config.adapter.rank} for `{base}`, {summary.trainable_params:,} parameters, trained on "
        f"`{data}` for {summary.steps} steps of {_batch(config)} pictures.\n",
        *_prediction(noise),
        *_losses(summary),
        *_grid(grid, config),
        _files(config, places),
        "## Configuration\n\n```yaml\n" + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True) + "```\n",
    ]
    return "\n".join(sections)


def _licence(config: DiffusionConfig) -> dict[str, str]:
    found = config.hub.license or _LICENCES.get(config.base.path)
    return {} if found is None else {"license": found}


def _is_on_hub(base: str) -> bool:
    return HUB_ID.fullmatch(base) is not None and not Path(base).exists()


def _batch(config: DiffusionConfig) -> int:
    return config.train.batch_size * config.train.accumulate * config.train.processes


def _prediction(noise: TrainingNoise) -> list[str]:
    """For those who have to set it by hand; SDXL's own is the rule."""
    if noise.prediction == "epsilon":
        return []
    spacing = ""
    if noise.zero_terminal_snr:
        spacing = ", over a schedule with zero terminal SNR (`rescale_betas_zero_snr`, `timestep_spacing: trailing`)"
    return [f"It predicts v (`prediction_type: {noise.prediction}`){spacing}.\n"]


def _losses(summary: RunSummary) -> list[str]:
    if summary.validation_loss is None or summary.base_validation_loss is None:
        return []
    return [
        f"Validation loss on held-out pictures: {summary.validation_loss:.4f}; without the adapter "
        f"{summary.base_validation_loss:.4f}.\n"
    ]


def _latest_grid(run: Path) -> Path | None:
    grids = (run / "samples").glob("step-*.png")
    return max(grids, key=lambda path: int(path.stem.removeprefix("step-")), default=None)


def _grid(grid: Path | None, config: DiffusionConfig) -> list[str]:
    if grid is None:
        return []
    prompts = "\n".join(f"1. {prompt}" for prompt in config.sample.prompts)
    return [f"![Samples](samples/{grid.name})\n", f"{prompts}\n"]


def _files(config: DiffusionConfig, places: Sequence[str]) -> str:
    name = config.name
    lines = ["## Files\n"]
    if config.adapter.in_peft:
        lines.append(f"- `{'`, `'.join(places)}`: PEFT folders.")
    lines.append(f"- `{name}.safetensors`: for ComfyUI, LyCORIS and kohya's tools.")
    if config.adapter.method != "lokr":
        equal = "the equal LoRA with DoRA" if config.adapter.dora else "the equal plain LoRA"
        lines.append(f"- `{name}_lora.safetensors`: {equal}, for diffusers.")
        lines.append(f'\n```python\npipeline.load_lora_weights(".", weight_name="{name}_lora.safetensors")\n```')
    if config.pivotal.token is not None:
        lines += _word(word_file(name), config.pivotal.token.lower())
    return "\n".join(lines) + "\n"


def _word(file: str, word: str) -> list[str]:
    loads = [
        f'pipeline.load_textual_inversion(vectors["{part}"], token="{word}", tokenizer=pipeline.tokenizer{end}, '
        f"text_encoder=pipeline.text_encoder{end})"
        for part, end in zip(PARTS, ("", "_2"), strict=True)
    ]
    return [
        f"\n- `{file}`: the embeddings of the word `{word}` for both text encoders, trained with the files above. In "
        f"prompts ComfyUI has the word as `embedding:{Path(file).stem}`, A1111 as `{Path(file).stem}`, the file's name "
        "in their folder of embeddings; diffusers as it is spelled here, in lower case:",
        "\n".join(
            [
                "\n```python",
                "from safetensors.torch import load_file\n",
                f'vectors = load_file("{file}")',
                *loads,
                "# Text is pooled at its end token, which SDXL's own configuration has wrong.",
                "pipeline.text_encoder_2.text_model.eos_token_id = pipeline.tokenizer_2.eos_token_id\n```",
            ]
        ),
    ]
