"""Megatron's indexed dataset: token arrays in one `.bin`, their places in one `.idx`, byte for byte.

Place in the path: token ids -> **megatron_dataset** -> batches, and any Megatron trainer. The `.bin` holds the
items back to back; the `.idx`, little-endian, holds: 9 bytes of magic, u64 version 1, u8 dtype code, u64 number of
sequences, u64 length of the document index, int32 lengths, int64 byte offsets, int64 document index (0 first, then
where each document ends).

Invariants: one sequence is one document here, though the reader takes several; a reader has held every figure of the
index against the others and against the size of the `.bin` before it hands out an item.

Example:
    with IndexedDatasetWriter(Path("train/text_tokens"), np.int32) as writer:
        writer.add_document(np.array([1, 2, 3]))
    IndexedDataset(Path("train/text_tokens"))[0]  # array([1, 2, 3], dtype=int32)

Source: the file format of Megatron-LM's `megatron/core/datasets/indexed_dataset.py`.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from vpstore.errors import RecipeRefused

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEAD = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name) for code, name in enumerate(("u1", "i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"), start=1)
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def bin_path(prefix: Path) -> Path:
    """The file of the items."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """The file of the index."""
    return prefix.with_name(prefix.name + ".idx")


class IndexedDatasetWriter:
    """Writes one dataset; the index is written when the `with` block ends without an error."""

    def __init__(self, prefix: Path, dtype: npt.DTypeLike) -> None:
        self.prefix, self.dtype = prefix, np.dtype(dtype).newbyteorder("<")
        if self.dtype not in _CODES:
            raise RecipeRefused(
                "a dtype has no code in the indexed format",
                where=prefix.name,
                expected=", ".join(str(known) for known in _CODES),
                found=str(self.dtype),
            )
        self._lengths = array("i")  # four bytes a document, as in the file
        self._bin: BinaryIO | None = None

    def __enter__(self) -> Self:
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin = bin_path(self.prefix).open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._bin is not None:
            self._bin.close()
            self._bin = None
        if kind is None:
            idx_path(self.prefix).write_bytes(self._index())

    def add_document(self, items: npt.ArrayLike) -> None:
        """Append one document of one sequence.

        Raises:  RecipeRefused: no items, more than 2**31 - 1, or a value outside the dtype.
        """
        values = np.asarray(items)
        self.add_documents(values, [values.size])

    def add_documents(self, items: npt.ArrayLike, lengths: Sequence[int]) -> None:
        """Append several documents of one sequence each, back to back.

        Args:    lengths: items of each; their sum is the number of all items.
        Raises:  RecipeRefused: as for `add_document`.
        """
        values = np.asarray(items)
        packed = values.astype(self.dtype)
        is_fit = values.ndim == 1 and all(0 < size < 2**31 for size in lengths) and sum(lengths) == values.size
        if not is_fit or not np.array_equal(packed, values):
            raise RecipeRefused(
                "a document does not fit the indexed format",
                where=f"{self.prefix.name}, document {len(self._lengths)}",
                expected=f"a flat, non-empty list of {self.dtype} values",
                found=f"shape {values.shape}, {values.dtype}",
            )
        if self._bin is None:
            raise RecipeRefused("the writer is not open", where=self.prefix.name, next_step="use it in a with block")
        self._bin.write(packed.tobytes())
        self._lengths.extend(lengths)

    def _index(self) -> bytes:
        lengths = np.asarray(self._lengths, dtype="<i4")
        sizes = lengths.astype("<i8") * self.dtype.itemsize
        offsets = np.cumsum(sizes, dtype="<i8") - sizes
        head = _HEAD.pack(MAGIC, VERSION, _CODES[self.dtype], lengths.size, lengths.size + 1)
        arrays = (lengths, offsets, np.arange(lengths.size + 1, dtype="<i8"))
        return b"".join((head, *(array.tobytes() for array in arrays)))


class IndexedDataset:
    """Reads one dataset through memory maps; `len` counts sequences."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        index = _read(idx_path(prefix))
        self.dtype, n_sequences, n_marks = _parse_head(index, idx_path(prefix).name)
        lengths, offsets, marks = np.split(
            np.frombuffer(index, dtype="u1", offset=_HEAD.size), np.cumsum([4 * n_sequences, 8 * n_sequences])
        )
        self.lengths: npt.NDArray[np.int32] = lengths.view("<i4")
        self._offsets: npt.NDArray[np.int64] = offsets.view("<i8")
        self.documents: npt.NDArray[np.int64] = marks.view("<i8")
        self._check(bin_path(prefix), n_marks)
        empty = self.lengths.size == 0  # an empty file cannot be mapped
        self._items: npt.NDArray[Any] = (
            np.empty(0, self.dtype) if empty else np.memmap(bin_path(prefix), dtype=self.dtype, mode="r")
        )
        self._starts = self._offsets // self.dtype.itemsize

    def __len__(self) -> int:
        return int(self.lengths.size)

    def __getitem__(self, sequence: int) -> npt.NDArray[Any]:
        if not 0 <= sequence < len(self):
            raise IndexError(f"sequence {sequence} of {len(self)}")
        start = int(self._starts[sequence])
        return self._items[start : start + int(self.lengths[sequence])]

    @property
    def items(self) -> npt.NDArray[Any]:
        """All items in file order."""
        return self._items

    def _check(self, path: Path, n_marks: int) -> None:
        """Hold the index against itself and against the size of the items' file."""
        sizes = self.lengths.astype(np.int64) * self.dtype.itemsize
        total = int(sizes.sum())
        found = path.stat().st_size if path.is_file() else None
        marks = self.documents
        problems = [
            ("lengths above zero", bool((self.lengths <= 0).any())),
            ("byte offsets that follow from the lengths", not np.array_equal(self._offsets, np.cumsum(sizes) - sizes)),
            ("a document index from 0", n_marks < 1 or marks[0] != 0),
            ("a rising document index", bool((np.diff(marks) <= 0).any())),
            (f"a document index that ends with {len(self)}", n_marks < 1 or marks[-1] != len(self)),
            (f"{path.name} of {total} bytes, not {found}", found != total),
        ]
        for expected, is_wrong in problems:
            if is_wrong:
                raise _damaged(self.prefix.name, expected, "something else")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _damaged(path.name, "a readable file", error.strerror or type(error).__name__) from error


def _parse_head(index: bytes, name: str) -> tuple[np.dtype[Any], int, int]:
    if len(index) < _HEAD.size:
        raise _damaged(name, f"at least {_HEAD.size} bytes", f"{len(index)} bytes")
    magic, version, code, n_sequences, n_marks = _HEAD.unpack_from(index)
    if magic != MAGIC or version != VERSION:
        raise _damaged(name, f"{MAGIC!r}, version {VERSION}", f"{magic!r}, version {version}")
    if code not in _DTYPES:
        raise _damaged(name, f"a dtype code from 1 to {len(_DTYPES)}", str(code))
    size = _HEAD.size + 12 * n_sequences + 8 * n_marks
    if size != len(index):
        raise _damaged(name, f"{size} bytes for {n_sequences} sequences and {n_marks} marks", f"{len(index)} bytes")
    return _DTYPES[code], n_sequences, n_marks


def _damaged(where: str, expected: str, found: str) -> RecipeRefused:
    return RecipeRefused(
        "an indexed dataset is damaged",
        where=where,
        expected=expected,
        found=found,
        next_step="build the dataset again",
    )
