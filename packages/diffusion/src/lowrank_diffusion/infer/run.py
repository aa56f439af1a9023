"""`lowrank infer` for adapters: from paths and prompts to a folder of pictures."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from lowrank_core.errors import LowrankError, UsageError
from lowrank_diffusion.infer.drawing import draw, shots_of
from lowrank_diffusion.infer.embeddings import check_words, embeddings_of
from lowrank_diffusion.infer.recipe import Recipe, UsedAdapter, UsedEmbedding, save_grid, save_picture, versions
from lowrank_diffusion.infer.schedulers import check_scheduler, make_scheduler, title_of
from lowrank_diffusion.infer.sources import Source, base_of, sources_of

_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Request:
    """What is asked for; None leaves a choice to the runs or the base."""

    adapters: Sequence[Path]
    prompts: Sequence[str]
    weights: Sequence[float] = ()
    embeddings: Sequence[str] = ()
    """Files of words' embeddings, `FILE` or `FILE:WORD`."""
    base: str | None = None
    config: str | None = None
    vae: str | None = None
    merged: bool | None = None
    negative: str | None = None
    seed: int = 0
    images: int = 1
    size: str | None = None
    """`WIDTHxHEIGHT`, or one number for a square."""
    steps: int = 25
    guidance: float = 5.0
    scheduler: str | None = None
    batch: int = 1
    grid: bool = False
    device: str = "auto"
    precision: str = "auto"
    out: Path | None = None


@dataclass(frozen=True)
class Drawn:
    """What came of it."""

    out: Path
    images: list[Path]
    grid: Path | None
    base: str
    adapters: Sequence[UsedAdapter]
    embeddings: Sequence[UsedEmbedding]
    merged: dict[str, bool]
    """By network that has adapters."""


@dataclass
class Told:
    """Who is told of what is done, and of each picture as it is written."""

    note: Callable[[str], None] = field(default=lambda text: None)
    drawn: Callable[[int, int], None] = field(default=lambda done, total: None)


def infer(request: Request, told: Told) -> Drawn:
    """Draw pictures and write them, each with its recipe.

    Raises:
        UsageError: a request that cannot be meant, such as a size that is no multiple of 8.
        LowrankError: adapters or a base that cannot be read or do not fit each other, a folder that holds files
            already, a picture that comes out as NaN, a full disk.
    """
    sources = sources_of(request.adapters, request.weights, or_none=bool(request.embeddings))
    embeddings = embeddings_of(sources, request.embeddings)
    _check(request)
    base = base_of(sources, request.base, request.vae, request.config)
    asked = None if request.size is None else size_of(request.size)
    device = device_of(request.device)
    precision = precision_of(request.precision, device)
    out = _free_folder(request.out)

    # diffusers takes ten seconds to import.
    from lowrank_diffusion.base import load_base
    from lowrank_diffusion.encoding import TextEncoders
    from lowrank_diffusion.infer.applying import apply
    from lowrank_diffusion.samples import grid

    pipeline: Any = load_base(
        base.path,
        base.vae,
        base.revision,
        _DTYPES[precision],
        told.note,
        config=base.config,
        option="base.path" if request.base is None else "--base",
        vae_option="base.vae" if request.vae is None else "--vae",
        config_option="base.config" if request.base is None else "--base-config",
    )
    pipeline.to(device)
    words = check_words(pipeline, embeddings)
    encoders = TextEncoders.of(pipeline, words) if words else None
    if encoders and (long := encoders.too_long([*request.prompts, request.negative or ""])):
        told.note(f"{len(long)} prompts are too long, and only their beginning is read, such as: {long[0]}")
    merged = apply(pipeline, sources, request.merged, told.note)
    pipeline.scheduler = make_scheduler(pipeline.scheduler, request.scheduler, base)
    width, height = asked or _usual_size(pipeline, sources)
    adapters = [UsedAdapter.of(source) for source in sources]
    used = [UsedEmbedding(each.word.text, each.path.name, each.digest) for each in embeddings]

    shots = shots_of(request.prompts, request.images)
    pictures, recipes, files = [], list[Recipe](), list[Path]()
    drawing = draw(
        pipeline,
        shots,
        seed=request.seed,
        negative=request.negative,
        size=(width, height),
        steps=request.steps,
        guidance=request.guidance,
        batch=request.batch,
        encoders=encoders,
    )
    for shot, picture in drawing:
        recipe = Recipe(
            prompt=shot.prompt,
            negative=request.negative,
            seed=request.seed,
            prompt_number=shot.prompt_number,
            image_number=shot.image_number,
            noise_seed=shot.noise_seed(request.seed),
            width=width,
            height=height,
            steps=request.steps,
            guidance=request.guidance,
            scheduler=title_of(request.scheduler, pipeline.scheduler),
            base=_shown(base.path),
            vae=None if base.vae is None else _shown(base.vae),
            adapters=adapters,
            embeddings=used,
            merged=merged,
            precision=precision,
            versions=versions(),
        )
        files.append(out / f"{shot.prompt_number:02}-{shot.image_number:02}-{slug(shot.prompt)}.png")
        save_picture(files[-1], picture, recipe)
        told.drawn(len(files), len(shots))
        if request.grid:
            pictures.append(picture)
            recipes.append(recipe)
    sheet = None
    if request.grid:
        sheet = out / "grid.png"
        save_grid(sheet, grid(pictures, request.images if len(request.prompts) > 1 else None), recipes)
    return Drawn(out, files, sheet, base.path, adapters, used, merged)


def _check(request: Request) -> None:
    if not request.prompts:
        raise UsageError("an adapter draws what --prompt says; give at least one")
    for option in ("images", "steps", "batch"):
        value = getattr(request, option)
        if value < 1:
            raise UsageError(f"--{option} must be at least 1, got {value}")
    if not 0 <= request.seed < 2**32:
        raise UsageError(f"--seed must be from 0 to {2**32 - 1}, got {request.seed}")
    if not 0 <= request.guidance < float("inf"):
        raise UsageError(f"--guidance must be a number from 0, got {request.guidance}")
    check_scheduler(request.scheduler)


def size_of(text: str) -> tuple[int, int]:
    """Width and height of `WIDTHxHEIGHT`, or of one number for a square.

    Raises:
        UsageError: it is neither, or a side is no multiple of 8 from 16.
    """
    found = re.fullmatch(r"(\d+)(?:[x×](\d+))?", text.strip().lower())
    if found is None:
        raise UsageError(f"--size is WIDTHxHEIGHT, such as 1024x768, got {text!r}")
    width, height = int(found[1]), int(found[2] or found[1])
    if width % 8 or height % 8 or min(width, height) < 16:
        raise UsageError(f"--size takes multiples of 8, from 16, got {width}x{height}")
    return width, height


def _usual_size(pipeline: Any, sources: Sequence[Source]) -> tuple[int, int]:
    """The side that the first run trained at, else the base's own."""
    own = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    side = next((source.run.data.resolution for source in sources if source.run is not None), own)
    return side, side


def device_of(name: str) -> torch.device:
    """The device of that name; `auto` is the machine's accelerator, else its CPU.

    Raises:
        LowrankError: there is no such device here.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise LowrankError(f"device {name!r} cannot be used here ({reason}); try --device cpu") from None


def precision_of(name: str, device: torch.device) -> str:
    """The precision of that name; `auto` is bf16 on CUDA and fp32 elsewhere.

    Raises:
        UsageError: no such precision.
    """
    if name == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    if name not in _DTYPES:
        raise UsageError(f"--precision is one of auto, {', '.join(_DTYPES)}, got {name!r}")
    return name


def _free_folder(out: Path | None) -> Path:
    if out is None:
        stem = Path("runs") / f"pictures-{datetime.now():%Y%m%d-%H%M%S}"
        numbered = (stem.with_name(f"{stem.name}-{number}") for number in range(2, 1000))
        return stem if not stem.exists() else next(path for path in numbered if not path.exists())
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        kind = "already holds files" if out.is_dir() else "is a file"
        raise LowrankError(f"{out} {kind}; choose a new or empty folder with --out")
    return out


def _shown(source: str) -> str:
    """A base as a shared picture may name it: a hub id, or a folder or file without the way there."""
    return Path(source).expanduser().resolve().name if Path(source).expanduser().exists() else source


def slug(prompt: str) -> str:
    """A prompt as a part of a file's name, in ASCII."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:40].strip("-") or "picture"
