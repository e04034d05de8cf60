"""Tensor tables of shards on disk: made once at publish, used to say which tensor is damaged.

Place in the path: between the pure table and the files. Reads shards in constant memory.
Invariants: a table is made from the same bytes whose digest names the shard; spans tile the file, so every damaged byte
falls into exactly one span or into the header.

Example:
    table = read_table(path, where="vpDense@wake-up, model-head.safetensors"); damaged_parts(path, table)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from blake3 import blake3

from vpstore.schema.digest import Digest
from vpstore.schema.tensor_table import ShardLayout, TensorRow, TensorTable, header_end, parse_header
from vpstore.storage import atomic

HEADER: Final = "(header)"
_LARGE: Final = 1 << 20


def read_table(path: Path, *, where: str) -> TensorTable:
    """Parse a shard's header and digest each of its tensors.

    Raises:  BadManifest: not an acceptable safetensors file.
    """
    with path.open("rb", buffering=0) as shard:
        size = os.fstat(shard.fileno()).st_size
        layout, head = _read_layout(shard, size, where)
        rows = tuple(
            TensorRow(
                span.name, span.dtype, span.shape, span.begin, span.end, _digest_span(shard, span.begin, span.end)
            )
            for span in layout.tensors
        )
    return TensorTable(size, (layout.header_end, Digest.of(head)), rows)


def read_layout(path: Path, *, where: str) -> ShardLayout:
    """Parse a shard's header alone.

    Raises:  BadManifest: not an acceptable safetensors file.
    """
    with path.open("rb", buffering=0) as shard:
        return _read_layout(shard, os.fstat(shard.fileno()).st_size, where)[0]


def _read_layout(shard: BinaryIO, size: int, where: str) -> tuple[ShardLayout, bytes]:
    head = _exactly(shard, 8)
    head += _exactly(shard, header_end(head, file_size=size, where=where) - 8)
    return parse_header(head, file_size=size, where=where), head


def damaged_parts(path: Path, table: TensorTable) -> Iterator[str]:
    """The names of the tensors whose bytes are not the table's; `(header)` for the header.

    A file that is too short damages every tensor that reaches beyond its end.
    """
    with path.open("rb", buffering=0) as shard:
        if _digest_span(shard, 0, table.header[0]) != table.header[1]:
            yield HEADER
        for row in table.tensors:
            if _digest_span(shard, row.begin, row.end) != row.digest:
                yield row.name


def _exactly(shard: BinaryIO, count: int) -> bytes:
    data = bytearray()
    while len(data) < count and (more := shard.read(count - len(data))):
        data += more
    return bytes(data)


def _digest_span(shard: BinaryIO, begin: int, end: int) -> Digest:
    state = blake3(max_threads=blake3.AUTO) if end - begin >= _LARGE else blake3()
    shard.seek(begin)
    left = end - begin
    while left and (data := shard.read(min(left, atomic.CHUNK))):
        state.update(data)
        left -= len(data)
    return Digest.from_hex(state.hexdigest())
