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

from vpstore.errors import BadManifest
from vpstore.schema.digest import Digest
from vpstore.schema.tensor_table import ShardLayout, TensorRow, TensorTable, header_end, parse_header
from vpstore.storage import atomic, hashing

HEADER: Final = "(header)"
_LARGE: Final = 1 << 20
_PIECE: Final = 1 << 20  # stays in a core's cache while it is hashed twice


def read_table(path: Path, *, where: str) -> TensorTable:
    """Parse a shard's header and digest each of its tensors.

    Raises:  BadManifest: not an acceptable safetensors file.
    """
    return read_shard(path, where=where)[0]


def read_shard(path: Path, *, where: str, threads: int = blake3.AUTO) -> tuple[TensorTable, Digest]:
    """The table of a shard and the digest of the whole, from one reading.

    Args:    threads: of the hashing; `blake3.AUTO` means all cores, for a large shard.
    Raises:  BadManifest: not an acceptable safetensors file, or one that changed while it was read.
    """
    with path.open("rb", buffering=0) as shard:
        size = os.fstat(shard.fileno()).st_size
        layout, head = _read_layout(shard, size, where)
        whole, spans = _state(size, threads), _Spans(layout, threads)
        piece = _PIECE if threads == 1 else hashing.WINDOW
        at = 0
        for window in hashing.windows(shard):
            for begin in range(0, len(window), piece):
                with window[begin : begin + piece] as part:
                    whole.update(part)
                    spans.update(part, at)
                    at += len(part)
    if at != size:
        raise BadManifest("a shard changed while it was read", where=where, expected=f"{size} bytes", found=f"{at}")
    header, rows = spans.finish()
    if header != Digest.of(head):
        raise BadManifest("a shard changed while it was read", where=where, expected=Digest.of(head), found=header)
    return TensorTable(size, (layout.header_end, header), rows), Digest.from_hex(whole.hexdigest())


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
    state = _state(end - begin, blake3.AUTO)
    shard.seek(begin)
    left = end - begin
    while left and (data := shard.read(min(left, atomic.CHUNK))):
        state.update(data)
        left -= len(data)
    return Digest.from_hex(state.hexdigest())


def _state(size: int, threads: int) -> blake3:
    return blake3(max_threads=threads) if threads != 1 and size >= _LARGE else blake3()


class _Spans:
    """The digests of the header and of each tensor, from the bytes as they pass by in order."""

    def __init__(self, layout: ShardLayout, threads: int) -> None:
        self._tensors, self._threads = layout.tensors, threads
        self._ends = [layout.header_end, *(span.end for span in layout.tensors)]
        self._digests: list[Digest] = []
        self._begin = 0
        self._next()

    def _next(self) -> None:
        """Begin the next span that has bytes; those without are finished at once."""
        while (number := len(self._digests)) < len(self._ends):
            self._state = _state(self._ends[number] - self._begin, self._threads)
            if self._ends[number] > self._begin:
                return
            self._close()

    def _close(self) -> None:
        self._begin = self._ends[len(self._digests)]
        self._digests.append(Digest.from_hex(self._state.hexdigest()))

    def update(self, part: memoryview, at: int) -> None:
        """Take the bytes that begin at `at`; what lies beyond the last span is ignored."""
        begin = 0
        while begin < len(part) and len(self._digests) < len(self._ends):
            left = self._ends[len(self._digests)] - at - begin
            with part[begin : begin + left] as inside:
                self._state.update(inside)
            begin += min(left, len(part) - begin)
            if at + begin == self._ends[len(self._digests)]:
                self._close()
                self._next()

    def finish(self) -> tuple[Digest, tuple[TensorRow, ...]]:
        """The header's digest and the rows; called when every byte has passed by."""
        header, *rest = self._digests
        rows = (
            TensorRow(span.name, span.dtype, span.shape, span.begin, span.end, digest)
            for span, digest in zip(self._tensors, rest, strict=True)
        )
        return header, tuple(rows)
