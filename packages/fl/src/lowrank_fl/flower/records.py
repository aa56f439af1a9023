"""Flower's array records over tensors that are already in memory, and the bytes a message takes on the wire."""

import math
from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from typing import Any, cast

import flwr.app
import numpy as np
import torch
from flwr.app import Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import InflatableObject
from numpy.lib import format as npy
from torch import Tensor


class Array(flwr.app.Array):
    """A Flower Array that holds its numbers as they are and becomes .npy bytes only when somebody asks for them.

    It keeps the name `Array`, because Flower writes the class's name into what it sends.
    """

    values: np.ndarray

    def __init__(self, values: np.ndarray, dtype: str | None = None) -> None:
        # NumPy takes longer to spell a dtype than everything else here takes.
        dtype = dtype or str(values.dtype)
        self.__dict__.update(dtype=dtype, shape=values.shape, stype="numpy.ndarray", values=values)

    @property
    def data(self) -> bytes:  # pyright: ignore[reportIncompatibleVariableOverride]
        return flwr.app.Array(self.values).data

    def numpy(self) -> np.ndarray:
        return self.values


class ArrayRecord(flwr.app.ArrayRecord):
    """A Flower ArrayRecord whose numbers lie in one block of memory; pickling passes the block on, not a copy."""

    layout: "Layout"
    block: Tensor
    slot: int | None

    def __init__(self, layout: "Layout", block: Tensor, slot: int | None = None) -> None:
        super().__init__()
        self.__dict__.update(layout=layout, block=block, slot=slot)
        flat = block.numpy()
        # Flower's own dictionary, past its check that each key is a text and each value an Array.
        held = self.__dict__["_data"]
        for name, (dtype, shape, start, stop) in layout.items():
            held[name] = Array(flat[start:stop].view(dtype).reshape(shape), dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        # Under multiprocessing torch hands a shared-memory tensor over by its file descriptor, which takes
        # milliseconds; a slot both sides have mapped already goes by its number.
        if self.slot is not None:
            return _from_slot, (self.layout, self.slot)
        return ArrayRecord, (self.layout, self.block)


Layout = dict[str, tuple[str, tuple[int, ...], int, int]]
"""Where each array lies in a block: dtype, shape, first and last byte."""


DOWNLINK_SLOT = 0
"""What the server sends lies here for the length of a round; the replies follow."""

_slots: Tensor | None = None


def map_slots(slots: Tensor | None) -> None:
    """Use these rows, `(1 + replies, bytes)`, for what this process's rounds send and receive."""
    global _slots
    _slots = slots


def _from_slot(layout: Layout, slot: int) -> ArrayRecord:
    assert _slots is not None, "map_slots comes before the first message"
    return ArrayRecord(layout, _slots[slot], slot)


def to_record(
    state: Mapping[str, Tensor] | Mapping[str, np.ndarray], *, shared: bool, slot: int | None = None
) -> ArrayRecord:
    """A copy of named tensors as one record.

    `shared` puts it where other processes can map it; `slot` overwrites that row of the mapped slots, where it fits.
    """
    tensors = {name: torch.as_tensor(values) for name, values in state.items()}
    layout, size = lay_out(tensors)
    if slot is not None and _slots is not None and slot < _slots.shape[0] and 0 < size <= _slots.shape[1]:
        record = _from_slot(layout, slot)
    else:
        # Allocated shared at once, because sharing it later would copy.
        storage = torch.UntypedStorage._new_shared(size) if shared else torch.UntypedStorage(size)
        record = ArrayRecord(layout, torch.empty(0, dtype=torch.uint8).set_(storage))
    for name, tensor in tensors.items():
        _, shape, start, stop = layout[name]
        record.block[start:stop].view(tensor.dtype).view(shape).copy_(tensor)
    return record


def lay_out(tensors: Mapping[str, Tensor]) -> tuple[Layout, int]:
    """Where tensors lie in a block, one after the other, and the block's bytes."""
    layout: Layout = {}
    end = 0
    for name, tensor in tensors.items():
        layout[name] = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), end, end + tensor.nbytes)
        end += -(-tensor.nbytes // 64) * 64  # every array starts on a cache line
    return layout, end


def array_records(content: RecordDict) -> dict[str, flwr.app.ArrayRecord]:
    """Content's array records by name, as `content.array_records`, which writes each of them back as it reads it."""
    return {name: record for name, record in content.items() if isinstance(record, flwr.app.ArrayRecord)}


def to_arrays(record: flwr.app.ArrayRecord) -> dict[str, np.ndarray]:
    """The arrays of any Flower record by name."""
    return {name: array.numpy() for name, array in record.items()}


def wire_bytes(message: Message) -> int:
    """The bytes of everything Flower serialises for a message: the envelope, the records, and every array in full.

    Sizes depend on names, dtypes, shapes and lengths alone, so arrays are measured once for each and their numbers are
    not serialised again. Flower sends identical arrays of one message once; here each counts. An array that came from
    elsewhere counts by the bytes that came, whatever it says it is.
    """
    if not message.has_content():
        return len(message.deflate())
    content = message.content
    # Flower's own way to rebuild a message it has received; its stubs leave it out.
    empty = Message(RecordDict(), metadata=message.metadata)  # pyright: ignore[reportCallIssue]
    envelope = len(empty.deflate())
    small = sum(len(record.deflate()) for record in content.values() if not isinstance(record, flwr.app.ArrayRecord))
    arrays = array_records(content)
    layouts = tuple(
        (name, tuple((key, *_measured(array)) for key, array in record.items())) for name, record in arrays.items()
    )
    others = tuple((name, type(record)) for name, record in content.items() if name not in arrays)
    return envelope + small + _content_bytes(layouts, others)


def _measured(array: flwr.app.Array) -> tuple[str, tuple[int, ...], str, int]:
    """What the bytes of an array depend on; last its length as .npy."""
    shape = tuple(array.shape)
    length = _npy_bytes(array.dtype, shape) if isinstance(array, Array) else len(array.data)
    return array.dtype, shape, array.stype, length


@lru_cache(maxsize=4096)
def _npy_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    kind, header = np.dtype(dtype), BytesIO()
    described = {"descr": npy.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(header, described)
    return header.tell() + kind.itemsize * math.prod(shape)


@lru_cache(maxsize=256)
def _content_bytes(layouts: tuple[Any, ...], others: tuple[Any, ...]) -> int:
    """The record dictionary and its array records, deflated once with arbitrary distinct bytes."""
    content = RecordDict()
    total = 0
    for number, (name, layout) in enumerate(layouts):
        record = flwr.app.ArrayRecord()
        for index, (key, dtype, shape, stype, length) in enumerate(layout):
            # No two arrays, and no two chunks of a large one, are alike.
            numbers = index + number * len(layout) + (np.arange(-(-length // 8)) << 24)
            record[key] = flwr.app.Array(dtype, shape, stype, numbers.tobytes()[:length])
        content[name] = record
        total += _nested_bytes(record)
    for name, kind in others:
        content[name] = kind({"number": len(content)})
    return total + len(content.deflate())


def _nested_bytes(item: InflatableObject) -> int:
    if isinstance(item, flwr.app.Array):
        chunks = cast(list[tuple[str, InflatableObject]], item.slice_array())
        return len(item.deflate()) + sum(len(chunk.deflate()) for _, chunk in chunks)
    return len(item.deflate()) + sum(_nested_bytes(child) for child in (item.children or {}).values())
