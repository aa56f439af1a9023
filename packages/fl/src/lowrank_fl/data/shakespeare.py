"""The plays of Shakespeare, one client a speaking role: 80 characters in, the next character out."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowrank_core.errors import LowrankError, UsageError, shortened
from lowrank_core.parsing import parse_json
from lowrank_fl.config import DataConfig, PartitionConfig
from lowrank_fl.data.examples import Examples
from lowrank_fl.data.rows import kept_rows

ALPHABET = "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"
"""LEAF's 80 symbols, in its order."""
WINDOW = 80
STRIDE = 5
_FIELDS = ("play", "role", "text")


def load_shakespeare(data: DataConfig, partition: PartitionConfig, seed: int) -> Examples:
    """Windows `(n, 80)` of symbol numbers, labels `(n,)` the number of the symbol that follows.

    Every role's first 80 % of text is for training and the rest for testing; no window reaches
    across. White space becomes one space, as in LEAF, and a symbol outside the alphabet a space.
    Roles too short for a window on both sides (under 401 characters) are left out.

    Windows start every 5 characters. LEAF's start at every character and keep 20 % of them in
    its experiments; a window is 80 bytes, so all plays together (4.3 million characters) take
    70 MB here instead of 340.

    `groups` are `play/role`, or the plays with `partition.id_column=play`.

    Reference: Caldas et al., LEAF, 2018, https://arxiv.org/abs/1812.01097

    Raises:
        UsageError: Without `data.path`, or for another `partition.id_column`.
        LowrankError: the file is missing, is not JSON lines of play, role and text, or has no role long enough.
    """
    column = partition.id_column or "role"
    if column not in ("role", "play"):
        raise UsageError(f"partition.id_column is {column!r}, but shakespeare has the columns play and role only")
    path = _file(data.path)
    parts: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    groups: list[str] = []
    for speaker in _roles(path):
        symbols = encode(speaker["text"])
        cut = len(symbols) * 4 // 5
        if len(symbols) - cut <= WINDOW:
            continue
        train = _windows(symbols[:cut])
        parts["train"].append(train)
        parts["test"].append(_windows(symbols[cut:]))
        group = speaker["play"] if column == "play" else f"{speaker['play']}/{speaker['role']}"
        groups += [group] * len(train)
    if not groups:
        raise LowrankError(f"no role in {path} has the 401 characters that a client needs; give longer texts")

    train, test = (np.concatenate(parts[split]) for split in ("train", "test"))
    kept = kept_rows(len(train), data.max_examples, seed)
    train = train[kept]
    return Examples(
        name=data.name,
        inputs=torch.from_numpy(train[:, :WINDOW].copy()),
        labels=torch.from_numpy(train[:, WINDOW].astype(np.int64)),
        test_inputs=torch.from_numpy(test[:, :WINDOW].copy()),
        test_labels=torch.from_numpy(test[:, WINDOW].astype(np.int64)),
        classes=tuple(ALPHABET),
        # Objects, because an array of fixed-width text would repeat every name in full.
        groups=np.array(groups, dtype=object)[kept],
    )


def encode(text: str) -> np.ndarray:
    """uint8 symbol numbers of a text, its white space made single spaces."""
    codes = np.frombuffer(" ".join(text.split()).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    table = np.full(128, ALPHABET.index(" "), dtype=np.uint8)
    for number, symbol in enumerate(ALPHABET):
        table[ord(symbol)] = number
    return np.where(codes < len(table), table[codes % len(table)], table[ord(" ")])


def _windows(symbols: np.ndarray) -> np.ndarray:
    """`(n, 81)`: each window and the symbol after it."""
    return np.lib.stride_tricks.sliding_window_view(symbols, WINDOW + 1)[::STRIDE]


def _file(path: str | None) -> Path:
    if path is None:
        raise UsageError(
            "shakespeare has no download here; set -o data.path=FILE to JSON lines with the fields play, role and text"
        )
    file = Path(path).expanduser()
    if file.is_dir():
        found = sorted(file.glob("*.jsonl"))
        if len(found) != 1:
            raise LowrankError(f"{path} holds {len(found)} files named *.jsonl; set data.path to the one that is meant")
        return found[0]
    if not file.is_file():
        raise LowrankError(f"data.path is {path}, and there is no such file; give the JSON lines of the roles")
    return file


def _roles(path: Path) -> list[dict[str, Any]]:
    roles = []
    # Bytes, so that a line that is no UTF-8 has a number too.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                role = parse_json(line)
            except ValueError as error:
                raise LowrankError(
                    f"line {number} of {path} is not JSON ({shortened(str(error))}); give one object a line with the "
                    "fields play, role and text"
                ) from error
            texts = role if isinstance(role, dict) else {}
            missing = [field for field in _FIELDS if not isinstance(texts.get(field), str)]
            if missing:
                raise LowrankError(
                    f"line {number} of {path} lacks the text of {', '.join(missing)}; give one object a line with "
                    "the fields play, role and text"
                )
            roles.append(role)
    return roles
