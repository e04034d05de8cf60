"""Bytes out of gzip and Zstandard files, and lines out of bytes, in the memory of one window.

Place in the path: a compressed source file -> **compressed** -> rows.

Invariants: a stream that ends too early is refused and never taken for a shorter one (the Zstandard library's own
reader says nothing of it); several streams in one file are one text.

Example:
    with Path("rows.jsonl.zst").open("rb") as handle:
        for line in lines_of(zstd_chunks(handle, "rows"), name="rows", limit=1 << 20): ...
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import zstandard

from recipes.data.row_reader import MEND
from vpstore.errors import RecipeRefused

_PACKED, _PLAIN = 1 << 14, 1 << 20  # bytes read at once
_MAX_WINDOW = 1 << 31  # what `zstd --long=31` writes; the library refuses 128 MiB and more unless it is asked


def zstd_chunks(handle: BinaryIO, name: str) -> Iterator[bytes]:
    """The text of a Zstandard file, in pieces.

    Raises:  RecipeRefused: damaged, or it ends inside a frame.
    """
    frame, is_whole = _frame(), False
    try:
        while packed := handle.read(_PACKED):
            while packed:
                yield frame.decompress(packed)
                packed, is_whole = (frame.unused_data, True) if frame.eof else (b"", False)
                if is_whole:
                    frame = _frame()
    except zstandard.ZstdError as error:
        raise _damaged(name, "Zstandard frames", str(error)) from error
    if not is_whole:
        raise _damaged(name, "a whole Zstandard frame", f"the end of the file after {handle.tell()} bytes")


def _frame() -> zstandard.ZstdDecompressionObj:
    return zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj()


def gzip_chunks(handle: BinaryIO, name: str) -> Iterator[bytes]:
    """The text of a gzip file, in pieces.

    Raises:  RecipeRefused: damaged, or it ends inside a member.
    """
    try:
        is_empty = True
        with gzip.GzipFile(fileobj=handle, mode="rb") as unpacked:
            while plain := unpacked.read(_PLAIN):
                is_empty = False
                yield plain
        if is_empty and not handle.tell():
            raise EOFError("the file is empty")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(name, "a whole gzip stream", str(error)) from error


def lines_of(chunks: Iterator[bytes], *, name: str, limit: int) -> Iterator[bytes]:
    """Lines without their ends; the last one may lack its end.

    Raises:  RecipeRefused: a line of more than `limit` bytes.
    """
    pending: list[bytes] = []
    size = 0
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        pending.append(first)
        size += len(first)
        for other in others:
            _require_short(size, name, limit)
            yield b"".join(pending)
            pending, size = [other], len(other)
        _require_short(size, name, limit)
    if size:
        yield b"".join(pending)


def _require_short(size: int, name: str, limit: int) -> None:
    if size > limit:
        raise _damaged(name, f"lines of at most {limit} bytes", "a longer one")


def _damaged(where: str, expected: str, found: str) -> RecipeRefused:
    return RecipeRefused(
        "a compressed source is damaged",
        where=where,
        expected=expected,
        found=found[:200],
        next_step=MEND,
    )
