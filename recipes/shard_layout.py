"""Where each tensor lies in a safetensors file: the layout that is written, and the one that is found.

Place in the path: below **tensors**, which moves the bytes. It decides bytes and is part of every code closure.

Invariants: a layout follows from names, dtypes and shapes alone: the widest dtype first, then by name, so that every
tensor stays aligned, as the stock writer also does.

Format: https://huggingface.co/docs/safetensors (8-byte little-endian header size, JSON header, data).

Example:
    >>> layout_of([PlannedTensor("a", "F32", (2,), compute)]).offsets
    {'a': 0}
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from recipes.names import shard_of
from recipes.planned import WIDTHS, Dtype, PlannedTensor

_HEADER_ALIGNMENT = 8


class Layout(NamedTuple):
    """One shard before it is written."""

    header: bytes
    data_bytes: int
    offsets: dict[str, int]  # in the data, in the order of the file


class Stored(NamedTuple):
    """One tensor as a file has it."""

    dtype: Dtype
    shape: tuple[int, ...]
    begin: int  # in the file


def layouts_of(tensors: Sequence[PlannedTensor]) -> dict[str, Layout]:
    """The layout of every shard of a plan, by its file's name, sorted."""
    groups: dict[str, list[PlannedTensor]] = {}
    for tensor in tensors:
        groups.setdefault(shard_of(tensor.name), []).append(tensor)
    return {shard: layout_of(group) for shard, group in sorted(groups.items())}


def layout_of(tensors: Sequence[PlannedTensor]) -> Layout:
    """The layout of one file with these tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, offsets = 0, {}
    for tensor in sorted(tensors, key=lambda t: (-WIDTHS[t.dtype], t.name)):
        offsets[tensor.name] = offset
        span = [offset, offset + tensor.size_bytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return Layout(struct.pack("<Q", len(text)) + text, offset, offsets)


def stored_in(path: Path) -> dict[str, Stored]:
    """What the header of a file says; the stock library has found the file to be sound."""
    with path.open("rb") as shard:
        (size,) = struct.unpack("<Q", shard.read(8))
        header: dict[str, Any] = json.loads(shard.read(size))
    header.pop("__metadata__", None)
    return {
        name: Stored(row["dtype"], tuple(row["shape"]), 8 + size + row["data_offsets"][0])
        for name, row in header.items()
    }
