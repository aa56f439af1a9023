"""Folders and tables of small pictures, made by the test that reads them."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lowrank_diffusion.config import DataConfig
from lowrank_diffusion.data.picture import Picture
from lowrank_diffusion.data.sources import find_pictures


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def find(notes: list[str]) -> Callable[..., list[Picture]]:
    """`find(path, caption_key=..., ...)`; what it has to say goes into `notes`."""

    def find(path: Path | str, seed: int = 0, **data: Any) -> list[Picture]:
        return find_pictures(DataConfig(path=str(path), **data), seed, notes.append)

    return find


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """`folder({"a.png": "red", "a.txt": "a caption"})`: colours become pictures of 4 x 3 pixels."""

    def folder(files: dict[str, str | bytes]) -> Path:
        root = tmp_path / "pictures"
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif path.suffix in (".png", ".jpg"):
                Image.new("RGB", (4, 3), content).save(path)
            else:
                path.write_text(content, encoding="utf-8")
        return root

    return folder


@pytest.fixture
def parquet(tmp_path: Path) -> Callable[..., Path]:
    """`parquet(image=["red"], text=["a caption"])`: a folder with train.parquet; `image...` are colours."""

    def parquet(split: str = "train", **columns: Iterable[Any]) -> Path:
        import datasets

        root = tmp_path / "table"
        root.mkdir(exist_ok=True)
        lists = {name: list(values) for name, values in columns.items()}
        for name in [name for name in lists if name.startswith("image")]:
            lists[name] = [colour and Image.new("RGB", (4, 3), colour) for colour in lists[name]]
        table = datasets.Dataset.from_dict(lists)
        for name in lists:
            if name.startswith("image"):
                table = table.cast_column(name, datasets.Image())
        table.to_parquet(root / f"{split}.parquet")
        return root

    return parquet
