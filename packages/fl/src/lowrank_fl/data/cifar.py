"""CIFAR-10 and CIFAR-100 from the archives that their authors publish.

The archives hold pickles, and unpickling can run any code. torchvision unpickles them freely;
here they are read in place by an unpickler that can only make lists, dicts, text, numbers and
numpy arrays, and only after torchvision's checksums agree.

Reference: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009,
https://www.cs.toronto.edu/~kriz/cifar.html
"""

import hashlib
import io
import pickle
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lowrank_core.errors import LowrankError
from lowrank_fl.config import DataConfig
from lowrank_fl.data.cache import cache_folder, download
from lowrank_fl.data.examples import Examples
from lowrank_fl.data.pixels import picture_examples
from lowrank_fl.data.rows import kept_rows

_LABELS = {"cifar10": "labels", "cifar100": "fine_labels"}


def load_cifar(data: DataConfig, seed: int) -> Examples:
    """Pixels `(n, 3, 32, 32)`: 50,000 for training and 10,000 for testing, of 10 or 100 classes.

    Raises:
        LowrankError: the download fails, or the archive is not the published one.
    """
    # torchvision takes seconds to import.
    from torchvision.datasets import CIFAR10, CIFAR100
    from torchvision.datasets.utils import check_integrity, download_url

    published = {"cifar10": CIFAR10, "cifar100": CIFAR100}[data.name]
    folder = cache_folder()
    path = folder / published.filename
    if not check_integrity(path, published.tgz_md5):
        with download(data.name, published.url, folder):
            download_url(published.url, folder, published.filename, published.tgz_md5)

    checksums = [*published.train_list, *published.test_list, [published.meta["filename"], published.meta["md5"]]]
    wanted = {f"{published.base_folder}/{name}": md5 for name, md5 in checksums}
    members = read_archive(path, wanted)
    train, test = (
        _stack([members[f"{published.base_folder}/{name}"] for name, _ in names], _LABELS[data.name])
        for names in (published.train_list, published.test_list)
    )
    kept = kept_rows(len(train[1]), data.max_examples, seed)
    names = members[f"{published.base_folder}/{published.meta['filename']}"][published.meta["key"]]
    return picture_examples(data.name, (train[0][kept], train[1][kept]), test, tuple(names))


def read_archive(path: Path, checksums: dict[str, str]) -> dict[str, Any]:
    """The unpickled members of a `.tar.gz` archive, by name; `checksums` holds each wanted member's MD5.

    Raises:
        LowrankError: a member is missing, has another checksum, or holds more than plain data.
    """
    members = {}
    with tarfile.open(path) as archive:
        for member in archive:
            if member.name not in checksums or not member.isfile():
                continue
            file = archive.extractfile(member)
            assert file is not None, "a regular member of a tar archive can be read"
            content = file.read()
            if hashlib.md5(content, usedforsecurity=False).hexdigest() != checksums[member.name]:
                raise LowrankError(
                    f"{member.name} in {path} is not the published file (its MD5 differs); delete {path} and run again"
                )
            members[member.name] = _PlainUnpickler(io.BytesIO(content), path).load()
    missing = sorted(set(checksums) - set(members))
    if missing:
        raise LowrankError(f"{path} lacks {', '.join(missing)}; delete it and run again")
    return members


class _PlainUnpickler(pickle.Unpickler):
    """Makes plain data and numpy arrays, and refuses every other name that a pickle asks for."""

    _ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        # numpy 1 and 2 keep the same function in two places; the archives name the older.
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def __init__(self, file: io.BytesIO, path: Path) -> None:
        # The archives were written by Python 2, whose text is bytes to Python 3.
        super().__init__(file, encoding="latin1")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise LowrankError(
                f"{self._path} asks to load {module}.{name}, which is no plain data, so it was not read; "
                "delete it and run again"
            )
        return self._ALLOWED[module, name]


def _stack(batches: list[dict[str, Any]], labels: str) -> tuple[np.ndarray, np.ndarray]:
    """All rows of the batches: pixels `(n, 3, 32, 32)` and labels `(n,)`."""
    pixels = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    return pixels, np.concatenate([np.asarray(batch[labels], dtype=np.int64) for batch in batches])
