"""Shorter forms of the numbers that travel: half precision, eight bits, and the largest entries alone. No Flower."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lowrank_core import LowrankError
from lowrank_fl.config import CodecConfig

Packed = dict[str, np.ndarray]
"""What travels for many arrays together, because each array of its own costs Flower some hundred bytes."""

# Arrays that are left alone keep their names beside these.
HALF, LEVELS, SCALES, INDICES, VALUES = "codec/half", "codec/levels", "codec/scales", "codec/indices", "codec/values"


class Undecodable(LowrankError):
    """What came is no encoding of the arrays that were expected."""


class Codec(Protocol):
    """Both ways take float32 numbers `(n,)`, those of several arrays one after the other, and the arrays' `sizes`."""

    def encode(self, flat: Tensor, sizes: Sequence[int], generator: torch.Generator) -> Packed: ...

    def decode(self, packed: Mapping[str, np.ndarray], sizes: Sequence[int]) -> Tensor:
        """Raises Undecodable where `packed` has not the arrays, dtypes and shapes that `encode` gives."""
        ...


class Half:
    """IEEE half precision, as FedPara's Table 12 has FedPAQ do it; 2 bytes a number.

    Finite numbers beyond half precision's range, 65504, become its end.
    """

    def encode(self, flat: Tensor, sizes: Sequence[int], generator: torch.Generator) -> Packed:
        end = torch.finfo(torch.float16).max
        return {HALF: torch.where(flat.isinf(), flat, flat.clamp(-end, end)).half().numpy()}

    def decode(self, packed: Mapping[str, np.ndarray], sizes: Sequence[int]) -> Tensor:
        return torch.from_numpy(_checked(packed, HALF, np.float16, sum(sizes)).astype(np.float32))


class Int8:
    """Whole multiples, -127 to 127, of a step for each array, rounded up or down at random so that the mean is right.

    QSGD's rounding (Alistarh et al., 2017, https://arxiv.org/abs/1610.02132), which FedPAQ (Reisizadeh et al., 2020,
    https://arxiv.org/abs/1909.13014) sends changes with; the step is the largest magnitude / 127. 1 byte a number. An
    array with a number that is not finite is none afterwards: all NaN.
    """

    def encode(self, flat: Tensor, sizes: Sequence[int], generator: torch.Generator) -> Packed:
        scales = torch.empty(len(sizes))
        levels = torch.empty(len(flat), dtype=torch.int8)
        noise = torch.rand(len(flat), generator=generator)
        end = 0
        for number, size in enumerate(sizes):
            start, end = end, end + size
            part = flat[start:end]
            # Never below the smallest normal number, where a division would lose its digits.
            scale = (part.abs().max() / 127 if size else torch.zeros(())).clamp(min=torch.finfo(torch.float32).tiny)
            scales[number] = scale if scale.isfinite() else torch.nan
            levels[start:end] = (part / scale + noise[start:end]).floor_().clamp_(-127, 127).nan_to_num_()
        return {LEVELS: levels.numpy(), SCALES: scales.numpy()}

    def decode(self, packed: Mapping[str, np.ndarray], sizes: Sequence[int]) -> Tensor:
        levels = torch.from_numpy(_checked(packed, LEVELS, np.int8, sum(sizes)).astype(np.float32))
        scales = torch.from_numpy(_checked(packed, SCALES, np.float32, len(sizes)).copy())
        return levels * scales.repeat_interleave(torch.tensor(sizes, dtype=torch.int64))


class TopK:
    """The largest share of all entries together, by magnitude; the others decode to 0. 8 bytes for each entry sent.

    Whoever encodes adds what was left out to the next numbers, error feedback (Seide et al., 2014; Stich et al., 2018,
    https://arxiv.org/abs/1809.07599): without it small entries would never arrive.
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def encode(self, flat: Tensor, sizes: Sequence[int], generator: torch.Generator) -> Packed:
        return sparse(flat, largest(flat, self.share))

    def decode(self, packed: Mapping[str, np.ndarray], sizes: Sequence[int]) -> Tensor:
        total = sum(sizes)
        indices, values = read_sparse(packed, total)
        if len(indices) != count(total, self.share):
            raise Undecodable(f"{len(indices)} entries came where {count(total, self.share)} of {total} were expected")
        flat = torch.zeros(total)
        flat[indices] = values
        return flat


def make_codec(name: str, config: CodecConfig) -> Codec:
    """The codec of that name, which is not `none`."""
    return {"fp16": Half(), "int8": Int8(), "topk": TopK(config.top_k)}[name]


def count(total: int, share: float) -> int:
    """How many of `total` entries are sent: at least one, if there are any."""
    return min(total, max(1, round(share * total)))


def largest(flat: Tensor, share: float) -> Tensor:
    """The indices, rising, of the entries of largest magnitude; the first of equal ones. NaN counts as the largest."""
    sent = count(len(flat), share)
    if not sent:
        return torch.zeros(0, dtype=torch.int64)
    magnitudes = flat.abs().nan_to_num_(nan=torch.inf, posinf=torch.inf)
    threshold = magnitudes.kthvalue(len(flat) - sent + 1).values
    above = (magnitudes > threshold).nonzero()[:, 0]
    equal = (magnitudes == threshold).nonzero()[: sent - len(above), 0]
    return torch.cat([above, equal]).sort().values


def sparse(flat: Tensor, indices: Tensor) -> Packed:
    """Those entries alone, as int32 indices and float32 values."""
    return {INDICES: indices.to(torch.int32).numpy(), VALUES: flat[indices].numpy()}


def read_sparse(packed: Mapping[str, np.ndarray], total: int) -> tuple[Tensor, Tensor]:
    """Indices (int64) and values of some of `total` entries; raises Undecodable where they are none."""
    sent = packed[INDICES].size if INDICES in packed else 0
    indices = torch.from_numpy(_checked(packed, INDICES, np.int32, sent).astype(np.int64))
    values = torch.from_numpy(_checked(packed, VALUES, np.float32, sent).copy())
    if sent and (indices[0] < 0 or indices[-1] >= total or bool((indices[1:] <= indices[:-1]).any())):
        raise Undecodable(f"the indices are not rising numbers from 0 to {total - 1}")
    return indices, values


def update(held: Tensor | None, packed: Mapping[str, np.ndarray], total: int) -> Tensor:
    """What a client holds, brought up to date by some entries' new values, or replaced by the values of all.

    Raises:
        Undecodable: `packed` is neither, or only some entries come and nothing of that size is held.
    """
    if INDICES not in packed:
        return torch.from_numpy(_checked(packed, VALUES, np.float32, total).copy())
    indices, values = read_sparse(packed, total)
    if held is None or len(held) != total:
        raise Undecodable("only what has changed came, and the client no longer has what it received before")
    updated = held.clone()
    updated[indices] = values
    return updated


def _checked(packed: Mapping[str, np.ndarray], name: str, dtype: type[np.generic], length: int) -> np.ndarray:
    if name not in packed:
        raise Undecodable(f"{name} is missing; there is {', '.join(packed) or 'nothing'}")
    array = packed[name]
    if array.dtype != dtype or array.shape != (length,):
        raise Undecodable(f"{name} is {array.dtype} {array.shape}, not {np.dtype(dtype)} ({length},)")
    return array
