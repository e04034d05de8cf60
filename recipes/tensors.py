"""Reading safetensors lazily and in pieces, planning tensors, and writing one file.

Place in the path: recipe -> **tensors** -> shards -> publish. It decides bytes and is part of every recipe's code
closure.

Invariants: a file's bytes depend only on the names, dtypes, shapes and values of its tensors. Files are read into
memory of their own and never mapped: a mapped page counts as the process's memory for as long as the map lasts, and a
walk through a checkpoint would end up holding all of it.

Format: https://huggingface.co/docs/safetensors, laid out by recipes.shard_layout.

Example:
    >>> TensorReader(path).read("model.norm.weight").shape
    torch.Size([64])
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from recipes.names import INDEX_FILE
from recipes.planned import WIDTHS, Dtype, PlannedTensor
from recipes.shard_layout import Stored, layout_of, stored_in
from vpstore.errors import RecipeRefused

TORCH_DTYPES: dict[Dtype, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES: dict[torch.dtype, Dtype] = {value: key for key, value in TORCH_DTYPES.items()}
PIECE_BYTES = 4 << 20  # of a large tensor, held at a time by each thread that moves it


class TensorReader:
    """Lazy access to the tensors of a directory: nothing is read until it is asked for. Threads may share one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._shards = _locate(directory)
        self._found: dict[str, dict[str, Stored]] = {}

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._shards)

    def __contains__(self, name: str) -> bool:
        return name in self._shards

    def spec(self, name: str) -> tuple[Dtype, tuple[int, ...]]:
        """Dtype and shape without reading the data."""
        stored, _ = self._stored(name)
        return stored.dtype, stored.shape

    def read(self, name: str) -> Tensor:
        """The whole tensor, on the CPU, in its stored dtype."""
        stored, path = self._stored(name)
        return _read(path, stored.begin, stored.dtype, stored.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start .. stop of a tensor's first dimension, and nothing else of it."""
        stored, path = self._stored(name)
        row_bytes = WIDTHS[stored.dtype] * math.prod(stored.shape[1:])
        shape = (max(0, min(stop, stored.shape[0]) - start), *stored.shape[1:])
        return _read(path, stored.begin + start * row_bytes, stored.dtype, shape)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The whole tensor as consecutive ranges of rows, each of about `PIECE_BYTES`."""
        dtype, shape = self.spec(name)
        for start, stop in iterate_rows(shape[0], piece_rows(dtype, shape)):
            yield self.rows(name, start, stop)

    def gather(self, name: str, rows: Sequence[int]) -> Tensor:
        """The named rows in the order given, without the whole matrix in memory."""
        dtype, shape = self.spec(name)
        index_N = torch.tensor(rows, dtype=torch.int64)
        out_ND = torch.empty((len(rows), *shape[1:]), dtype=TORCH_DTYPES[dtype])
        for start, stop in iterate_rows(shape[0], piece_rows(dtype, shape)):
            at_M = ((index_N >= start) & (index_N < stop)).nonzero()[:, 0]
            if len(at_M):
                out_ND[at_M] = self.rows(name, start, stop)[index_N[at_M] - start]
        return out_ND

    def _stored(self, name: str) -> tuple[Stored, Path]:
        if name not in self._shards:
            raise RecipeRefused(
                "an input has no tensor of this name",
                where=f"{self.directory.name}: {name}",
                found=f"{len(self._shards)} tensors",
                next_step="rebuild the input, or name the artifact that the recipe is written for",
            )
        shard = self._shards[name]
        path = self.directory / shard
        if shard not in self._found:
            with _opened(path):  # the stock library's word that header and length are sound
                self._found[shard] = stored_in(path)
        if name not in self._found[shard]:
            raise SafetensorError(f"File does not contain tensor {name}")
        return self._found[shard][name], path


def _locate(directory: Path) -> dict[str, str]:
    index = directory / INDEX_FILE
    if index.is_file():
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    found: dict[str, str] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with _opened(path) as shard:
                found.update(dict.fromkeys(shard.keys(), path.name))
        except SafetensorError as error:
            raise RecipeRefused("a shard is not readable", where=str(path.name), found=str(error)) from error
    return found


def _opened(path: Path) -> AbstractContextManager[Any]:
    # The stock stub types safe_open loosely; a context manager is what it documents. NumPy's maps no data.
    return cast(AbstractContextManager[Any], safe_open(path, framework="np"))


def _read(path: Path, begin: int, dtype: Dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor of its own memory, filled from the file.

    Raises:  OSError: also where the file ends before the tensor does.
    """
    found = torch.empty(shape, dtype=TORCH_DTYPES[dtype])
    left = raw_bytes(found)
    with path.open("rb", buffering=0) as shard:
        while len(left):
            count = os.preadv(shard.fileno(), [left[: 1 << 30]], begin)
            if not count:
                raise OSError(f"{path.name} ends before the tensors that its header names")
            left, begin = left[count:], begin + count
    return found


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one file, on the CPU."""
    with _opened(path):
        found = stored_in(path)
    return {name: _read(path, at.begin, at.dtype, at.shape) for name, at in sorted(found.items())}


def planned(name: str, shape: Sequence[int], dtype: Dtype, compute: Callable[[], Tensor]) -> PlannedTensor:
    """A planned tensor whose result is cast to `dtype` (round to nearest even) if it is computed in another."""

    def cast_result() -> Tensor:
        return compute().to(TORCH_DTYPES[dtype])

    return PlannedTensor(name, dtype, tuple(shape), cast_result)


def planned_rows(name: str, shape: Sequence[int], dtype: Dtype, rows: Callable[[], Iterable[Tensor]]) -> PlannedTensor:
    """A planned tensor that is computed range by range along its first dimension, and cast as `planned` does."""

    def cast_rows() -> Iterator[Tensor]:
        return (part.to(TORCH_DTYPES[dtype]) for part in rows())

    return PlannedTensor(name, dtype, tuple(shape), lambda: torch.cat(list(cast_rows())), cast_rows)


def kept(reader: TensorReader, name: str, new_name: str | None = None) -> PlannedTensor:
    """The parent's tensor, bit for bit, under its own or a new name."""
    dtype, shape = reader.spec(name)
    kept_whole = PlannedTensor(new_name or name, dtype, shape, lambda: reader.read(name))
    if kept_whole.size_bytes <= PIECE_BYTES or not shape:
        return kept_whole
    return replace(kept_whole, rows=lambda: reader.pieces(name))


def piece_rows(dtype: Dtype, shape: Sequence[int]) -> int:
    """How many rows of the first dimension make up a piece of about `PIECE_BYTES`."""
    return max(1, PIECE_BYTES // max(1, WIDTHS[dtype] * math.prod(shape[1:])))


def raw_bytes(tensor: Tensor) -> memoryview:
    """Row-major little-endian bytes of a CPU tensor, without a copy where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.numel() == 0:
        return memoryview(b"")
    return memoryview(cast(Any, flat.view(torch.uint8).numpy()))


def require_finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:  RecipeRefused: how many values are not finite.
    """
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise RecipeRefused(
            "a computed tensor is not finite",
            where=name,
            expected="finite values",
            found=f"{bad} of {tensor.numel()} values are NaN or infinite",
            next_step="look at the recipe's report of the step before; nothing was published",
        )


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file, written beside its name and renamed, so that it is whole or absent.

    Raises:  RecipeRefused: a value that is not finite.
    """
    for name in sorted(tensors):
        require_finite(f"{path.name}: {name}", tensors[name])
    specs = [PlannedTensor(n, DTYPE_NAMES[t.dtype], tuple(t.shape), lambda: torch.empty(0)) for n, t in tensors.items()]
    layout = layout_of(specs)
    partial = path.with_suffix(path.suffix + ".partial")
    with partial.open("wb") as out:
        out.write(layout.header)
        for name in layout.offsets:
            out.write(raw_bytes(tensors[name]))
        out.flush()
        os.fsync(out.fileno())
    partial.rename(path)


def iterate_rows(total: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges [start, stop) that cover 0..total."""
    for start in range(0, total, chunk):
        yield start, min(start + chunk, total)
