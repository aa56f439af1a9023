"""Named arrays as one row of numbers and back, so that a codec sees a whole model at once."""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lowrank_fl.codecs import Undecodable

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Layout:
    """The names, dtypes and shapes of arrays, in their order.

    Codecs are for floating-point numbers; other arrays are left alone, and so are the statistics of norms, because
    an inexact variance can be negative.
    """

    entries: tuple[tuple[str, str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, arrays: Arrays) -> "Layout":
        return cls(tuple((name, str(array.dtype), tuple(array.shape)) for name, array in arrays.items()))

    @classmethod
    def from_bytes(cls, text: bytes) -> "Layout":
        """The inverse of `to_bytes`.

        Raises:
            Undecodable: `text` is no layout.
        """
        try:
            entries = tuple(
                (str(name), str(np.dtype(dtype)), tuple(int(size) for size in shape))
                for name, dtype, shape in json.loads(text)
            )
        except (TypeError, ValueError) as error:
            raise Undecodable(f"the arrays are not described ({error})") from None
        if any(size < 0 for _, _, shape in entries for size in shape):
            raise Undecodable("the arrays are described with negative sizes")
        return cls(entries)

    def part(self, names: Collection[str]) -> "Layout":
        """Of the arrays with these names alone."""
        return Layout(tuple(entry for entry in self.entries if entry[0] in names))

    def places(self, names: Collection[str]) -> Tensor:
        """Where the numbers of those arrays stand in the row of all; int64."""
        encoded = [name for name, dtype, _ in self.entries if _is_encoded(name, dtype)]
        chosen = torch.tensor([name in names for name in encoded])
        return chosen.repeat_interleave(torch.tensor(self.sizes)).nonzero()[:, 0]

    def to_bytes(self) -> bytes:
        return json.dumps(self.entries, separators=(",", ":")).encode()

    @cached_property
    def kept(self) -> list[str]:
        """The names of what no codec touches."""
        return [name for name, dtype, _ in self.entries if not _is_encoded(name, dtype)]

    @cached_property
    def sizes(self) -> list[int]:
        """Numbers in each of the other arrays."""
        return [math.prod(shape) for name, dtype, shape in self.entries if _is_encoded(name, dtype)]

    @property
    def total(self) -> int:
        return sum(self.sizes)

    def flat(self, arrays: Arrays) -> Tensor:
        """What codecs work on: float32 `(total,)`, the arrays one after the other. A copy."""
        flat = np.empty(self.total, np.float32)
        end = 0
        with np.errstate(over="ignore"):  # beyond float32 numbers are not finite, which the server sees
            for name, dtype, shape in self.entries:
                if _is_encoded(name, dtype):
                    start, end = end, end + math.prod(shape)
                    flat[start:end] = arrays[name].reshape(-1)
        return torch.from_numpy(flat)

    def arrays(self, flat: Tensor, others: Arrays) -> dict[str, np.ndarray]:
        """The arrays of those numbers in their dtypes, sharing memory where they can; the kept ones are of `others`.

        Raises:
            Undecodable: `others` lacks one of them, or has it with another dtype or shape.
        """
        numbers, end = flat.numpy(), 0
        restored: dict[str, np.ndarray] = {}
        for name, dtype, shape in self.entries:
            if _is_encoded(name, dtype):
                start, end = end, end + math.prod(shape)
                with np.errstate(over="ignore"):
                    restored[name] = numbers[start:end].astype(dtype, copy=False).reshape(shape)
            elif name not in others or others[name].dtype != dtype or others[name].shape != shape:
                raise Undecodable(f"{name} is missing or is not {dtype} {shape}")
            else:
                restored[name] = others[name]
        return restored


def _is_encoded(name: str, dtype: str) -> bool:
    return np.issubdtype(np.dtype(dtype), np.floating) and not name.endswith(("running_mean", "running_var"))
