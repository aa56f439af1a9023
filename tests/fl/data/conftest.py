"""Small data sets in the layouts that are published, made by the test that reads them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lowrank_fl.config import DataConfig, PartitionConfig
from lowrank_fl.data.examples import Examples
from lowrank_fl.data.load import load_examples


@pytest.fixture(autouse=True)
def _caches_of_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def load() -> Callable[..., Examples]:
    """`load(name=..., path=..., natural="writer")`, with seed 0 unless given."""

    def load(natural: str | None = None, seed: int = 0, **data: Any) -> Examples:
        partition = PartitionConfig(kind="natural", id_column=natural) if natural else PartitionConfig()
        data["path"] = None if data.get("path") is None else str(data["path"])
        return load_examples(DataConfig(**data), partition, seed)

    return load


@pytest.fixture
def write_parquet() -> Callable[..., None]:
    """`write_parquet(file, {column: values}, {column: feature})`: a file as the hub holds them."""

    def write(file: Path, columns: dict[str, list[Any]], features: dict[str, Any]) -> None:
        import datasets

        file.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(str(file), batch_size=1000)

    return write


@pytest.fixture
def write_picture() -> Callable[..., Path]:
    """`write_picture(file, mode, color, size)`: a picture of one colour."""

    def write(file: Path, mode: str = "RGB", color: Any = 0, size: tuple[int, int] = (4, 4)) -> Path:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, color).save(file)
        return file

    return write


@pytest.fixture
def labelled() -> Callable[..., Examples]:
    """`labelled([0, 1, 1], groups=[...])`: examples of one grey pixel with these labels."""

    def labelled(labels: Any, groups: list[str] | None = None) -> Examples:
        numbers = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
        pixels = torch.zeros(len(numbers), 1, 1, 1, dtype=torch.uint8)
        return Examples(
            name="made",
            inputs=pixels,
            labels=numbers,
            test_inputs=pixels[:1],
            test_labels=numbers[:1],
            classes=tuple(str(number) for number in range(int(numbers.max()) + 1)),
            mean=(0.0,),
            std=(1.0,),
            groups=None if groups is None else np.array(groups, dtype=object),
        )

    return labelled
