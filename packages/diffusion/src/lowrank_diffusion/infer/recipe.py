"""How a picture was made, written into its file."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from lowrank_core.files.tensors import write_bytes


@dataclass(frozen=True)
class UsedAdapter:
    """An adapter by its name, with the SHA-256 of each of its files."""

    name: str
    weight: float
    files: Mapping[str, str]


@dataclass(frozen=True)
class UsedEmbedding:
    """A word of prompts, and the name and SHA-256 of the file of its embeddings."""

    word: str
    file: str
    sha256: str


@dataclass(frozen=True)
class Recipe:
    """All it takes to make the picture again: the same adapters, on the same base, with these values."""

    prompt: str
    negative: str | None
    seed: int
    """As it was asked for."""
    prompt_number: int
    image_number: int
    """Both from 1; they and the seed give `noise_seed`."""
    noise_seed: int
    """Of the torch generator on the CPU that the picture's noise came from."""
    width: int
    height: int
    steps: int
    guidance: float
    scheduler: str
    base: str
    vae: str | None
    adapters: Sequence[UsedAdapter]
    embeddings: Sequence[UsedEmbedding]
    merged: Mapping[str, bool]
    """By network."""
    precision: str
    versions: Mapping[str, str]

    def parameters(self) -> str:
        """As A1111 writes it, with adapters in the prompt as its readers know them."""
        tags = "".join(f" <lora:{adapter.name}:{adapter.weight:g}>" for adapter in self.adapters)
        values = {
            "Steps": self.steps,
            "Sampler": self.scheduler,
            "CFG scale": f"{self.guidance:g}",
            "Seed": self.noise_seed,
            "Size": f"{self.width}x{self.height}",
            "Model": self.base,
            "Version": f"lowrank {self.versions['lowrank-diffusion']}",
        }
        negative = f"Negative prompt: {self.negative}\n" if self.negative else ""
        return f"{self.prompt}{tags}\n{negative}" + ", ".join(f"{key}: {value}" for key, value in values.items())


def versions() -> dict[str, str]:
    """Of what computes."""
    return {name: version(name) for name in ("lowrank-diffusion", "diffusers", "transformers", "torch")}


def save_picture(path: Path, picture: Image.Image, recipe: Recipe) -> None:
    """A PNG with two text chunks: `parameters` as A1111 writes it, and `lowrank`, JSON with everything.

    Raises:
        LowrankError: the disk is full, or the folder cannot be written to.
    """
    _write(path, picture, {"parameters": recipe.parameters(), "lowrank": json.dumps(asdict(recipe))})


def save_grid(path: Path, picture: Image.Image, recipes: Sequence[Recipe]) -> None:
    """A PNG of several pictures, with the list of their recipes as `lowrank`.

    Raises:
        LowrankError: as `save_picture`.
    """
    _write(path, picture, {"lowrank": json.dumps([asdict(recipe) for recipe in recipes])})


def _write(path: Path, picture: Image.Image, chunks: Mapping[str, str]) -> None:
    information: Any = PngImagePlugin.PngInfo()
    for key, text in chunks.items():
        information.add_text(key, text)
    content = io.BytesIO()
    picture.save(content, "png", pnginfo=information)
    write_bytes(path, content.getvalue())
