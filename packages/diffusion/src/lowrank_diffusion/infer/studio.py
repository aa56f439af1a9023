"""A base with adapters on it, loaded once, that draws as often as it is asked."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lowrank_diffusion.infer.drawing import draw, shots_of
from lowrank_diffusion.infer.embeddings import Embedding, check_words, embeddings_of
from lowrank_diffusion.infer.recipe import Recipe, UsedAdapter, UsedEmbedding, save_grid, save_picture, versions
from lowrank_diffusion.infer.request import DTYPES, Request, device_of, precision_of, size_of
from lowrank_diffusion.infer.schedulers import make_scheduler, title_of
from lowrank_diffusion.infer.sources import Base, Source, base_of, sources_of, weights_of


@dataclass(frozen=True)
class Means:
    """What is drawn with."""

    sources: Sequence[Source]
    embeddings: Sequence[Embedding]
    base: Base
    device: torch.device
    precision: str


def means_of(request: Request, note: Callable[[str], None]) -> Means:
    """What a request draws with, checked as far as can be before a base is loaded; `note` is told of downloads.

    Raises:
        UsageError: as many weights as adapters are not given, the base is not known, or there is no such precision.
        LowrankError: an adapter, a file of embeddings or a device that is not there.
    """
    sources = sources_of(request.adapters, note)
    weights_of(sources, request.weights)
    embeddings = embeddings_of(sources, request.embeddings)
    base = base_of(sources, request.base, request.vae, request.config)
    device = device_of(request.device)
    return Means(sources, embeddings, base, device, precision_of(request.precision, device))


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
    """Who is told of what is done, and of each picture as it is written.

    go_on: told after each denoising step which share of all steps is done, says whether to take the next.
    """

    note: Callable[[str], None] = field(default=lambda text: None)
    drawn: Callable[[int, int], None] = field(default=lambda done, total: None)
    go_on: Callable[[float], bool] = field(default=lambda share: True)


class Studio:
    """A base with adapters on it.

    Args:
        means: adapters, embeddings, the base, and where and how to compute.
        request: whether to merge, and what the user gave the base by.
        note: told of downloads.
        once: there is one drawing only, so what another one would need leaves the memory.

    Raises:
        LowrankError: adapters or a base that cannot be read or do not fit each other.
    """

    def __init__(self, means: Means, request: Request, note: Callable[[str], None], *, once: bool) -> None:
        # diffusers takes ten seconds to import.
        from lowrank_diffusion.base import load_base
        from lowrank_diffusion.encoding import TextEncoders
        from lowrank_diffusion.infer.applying import Applied

        base = means.base
        self.means = means
        self._pipeline: Any = load_base(
            base.path,
            base.vae,
            base.revision,
            DTYPES[means.precision],
            note,
            config=base.config,
            option="base.path" if request.base is None else "--base",
            vae_option="base.vae" if request.vae is None else "--vae",
            config_option="base.config" if request.base is None else "--base-config",
        )
        self._pipeline.to(means.device)
        words = check_words(self._pipeline, means.embeddings)
        self._encoders = TextEncoders.of(self._pipeline, words) if words else None
        self._applied = Applied(self._pipeline, means.sources, request.merged, once=once)
        self._own_scheduler = self._pipeline.scheduler
        self._digests = [source.digests() for source in means.sources]
        self._used = [UsedEmbedding(each.word.text, each.path.name, each.digest) for each in means.embeddings]

    @property
    def base_name(self) -> str:
        return _shown(self.means.base.path)

    @property
    def usual_size(self) -> tuple[int, int]:
        """Width and height: the side that the first run trained at, else the base's own."""
        own = self._pipeline.unet.config.sample_size * self._pipeline.vae_scale_factor
        side = next((source.run.data.resolution for source in self.means.sources if source.run is not None), own)
        return side, side

    def draw(self, request: Request, out: Path, told: Told) -> Drawn:
        """Draw pictures and write them, each with its recipe.

        Args:
            request: one that `check` lets pass; the adapters, base, device and precision are the studio's own.
            out: a folder that is new or empty.
            told: what is done; where it stops drawing, the pictures that are done remain.

        Raises:
            UsageError: a scheduler that cannot follow the adapters' noise schedule, or wrong weights.
            LowrankError: a picture that comes out as NaN, a full disk.
        """
        from lowrank_diffusion.samples import grid

        means, pipeline = self.means, self._pipeline
        weights = weights_of(means.sources, request.weights)
        if self._encoders and (long := self._encoders.too_long([*request.prompts, request.negative or ""])):
            told.note(f"{len(long)} prompts are too long, and only their beginning is read, such as: {long[0]}")
        pipeline.scheduler = make_scheduler(self._own_scheduler, request.scheduler, means.base)
        merged = self._applied.weigh(weights, told.note)
        width, height = self.usual_size if request.size is None else size_of(request.size)
        adapters = [
            UsedAdapter(source.name, weight, digests)
            for source, weight, digests in zip(means.sources, weights, self._digests, strict=True)
        ]
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
            encoders=self._encoders,
            go_on=told.go_on,
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
                base=self.base_name,
                vae=None if means.base.vae is None else _shown(means.base.vae),
                adapters=adapters,
                embeddings=self._used,
                merged=merged,
                precision=means.precision,
                versions=versions(),
            )
            files.append(out / f"{shot.prompt_number:02}-{shot.image_number:02}-{slug(shot.prompt)}.png")
            save_picture(files[-1], picture, recipe)
            told.drawn(len(files), len(shots))
            if request.grid:
                pictures.append(picture)
                recipes.append(recipe)
        sheet = None
        if pictures:
            sheet = out / "grid.png"
            save_grid(sheet, grid(pictures, request.images if len(request.prompts) > 1 else None), recipes)
        return Drawn(out, files, sheet, means.base.path, adapters, self._used, merged)


def _shown(source: str) -> str:
    """A base as a shared picture may name it: a hub id, or a folder or file without the way there."""
    return Path(source).expanduser().resolve().name if Path(source).expanduser().exists() else source


def slug(prompt: str) -> str:
    """A prompt as a part of a file's name, in ASCII."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:40].strip("-") or "picture"
