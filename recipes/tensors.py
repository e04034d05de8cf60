"""Reading and writing safetensors: lazily, one tensor at a time, resumable.

Place in the path: recipe -> **tensors** -> publish. This module decides the bytes of every shard and is part of every
recipe's code closure.

Invariants: a shard's bytes depend only on the names, dtypes, shapes and values of its tensors; its layout is known
before a tensor is computed, so tensors can be written in any order by any number of processes. A tensor counts as done
only if the digest in its marker is that of the bytes in the shard: a torn write is computed again, never published.

Format: https://huggingface.co/docs/safetensors (8-byte little-endian header size, JSON header, data).

Example:
    >>> TensorReader(path).read("model.norm.weight").shape
    torch.Size([64])
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from torch import Tensor

from recipes.names import INDEX_FILE, shard_of
from recipes.planned import Dtype, PlannedTensor
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
_HEADER_ALIGNMENT = 8


class TensorReader:
    """Lazy access to the tensors of a directory: nothing is read until it is asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._shards = _locate(directory)
        self._open: dict[str, Any] = {}

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._shards)

    def __contains__(self, name: str) -> bool:
        return name in self._shards

    def spec(self, name: str) -> tuple[Dtype, tuple[int, ...]]:
        """Dtype and shape without reading the data."""
        view = self._handle(name).get_slice(name)
        return cast(Dtype, view.get_dtype()), tuple(view.get_shape())

    def read(self, name: str) -> Tensor:
        """The whole tensor, on the CPU, in its stored dtype."""
        return cast(Tensor, self._handle(name).get_tensor(name))

    def _handle(self, name: str) -> Any:
        if name not in self._shards:
            raise RecipeRefused(
                "an input has no tensor of this name",
                where=f"{self.directory.name}: {name}",
                found=f"{len(self._shards)} tensors",
                next_step="rebuild the input, or name the artifact that the recipe is written for",
            )
        shard = self._shards[name]
        if shard not in self._open:
            self._open[shard] = safe_open(self.directory / shard, framework="pt", device="cpu")
        return self._open[shard]


def _locate(directory: Path) -> dict[str, str]:
    index = directory / INDEX_FILE
    if index.is_file():
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    found: dict[str, str] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt", device="cpu") as shard:
                found.update(dict.fromkeys(shard.keys(), path.name))
        except SafetensorError as error:
            raise RecipeRefused("a shard is not readable", where=str(path.name), found=str(error)) from error
    return found


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one file, on the CPU."""
    # The stock stub types safe_open loosely; a context manager is what it documents.
    with cast(AbstractContextManager[Any], safe_open(path, framework="pt", device="cpu")) as shard:
        return {name: shard.get_tensor(name) for name in sorted(shard.keys())}


def planned(name: str, shape: Sequence[int], dtype: Dtype, compute: Callable[[], Tensor]) -> PlannedTensor:
    """A planned tensor whose result is cast to `dtype` (round to nearest even) if it is computed in another."""

    def cast_result() -> Tensor:
        return compute().to(TORCH_DTYPES[dtype])

    return PlannedTensor(name, dtype, tuple(shape), cast_result)


def kept(reader: TensorReader, name: str, new_name: str | None = None) -> PlannedTensor:
    """The parent's tensor, bit for bit, under its own or a new name."""
    dtype, shape = reader.spec(name)
    return PlannedTensor(new_name or name, dtype, shape, lambda: reader.read(name))


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


class ShardWriter:
    """Lays out shards for tensors of known shape and fills them in any order; see the module's invariants."""

    def __init__(self, directory: Path, tensors: Sequence[PlannedTensor]) -> None:
        self.directory = directory
        self._markers = directory.parent / (directory.name + ".done")
        self._plan = {tensor.name: tensor for tensor in tensors}
        self._layout = _layout(tensors)
        directory.mkdir(parents=True, exist_ok=True)
        self._markers.mkdir(parents=True, exist_ok=True)

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards together, headers included."""
        return sum(len(header) + size for header, size, _ in self._layout.values())

    def prepare(self) -> None:
        """Create each shard at its full length with its header; a shard that already has both is kept."""
        for shard, (header, data_size, _) in self._layout.items():
            path = self.directory / shard
            if path.exists() and path.stat().st_size == len(header) + data_size:
                with path.open("rb") as held:
                    if held.read(len(header)) == header:
                        continue
            with path.open("wb") as out:
                out.write(header)
                out.truncate(len(header) + data_size)

    def is_done(self, name: str) -> bool:
        """Whether the bytes in the shard are those that a finished computation put there."""
        marker = self._marker(name)
        return marker.exists() and marker.read_text() == blake3(self._read(name)).hexdigest()

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a computed tensor in its place.

        Raises:  RecipeRefused: another dtype or shape than planned, or a value that is not finite.
        """
        promised = self._plan[name]
        found = (DTYPE_NAMES.get(tensor.dtype), tuple(tensor.shape))
        if found != (promised.dtype, promised.shape):
            raise RecipeRefused(
                "a recipe computed another tensor than it planned",
                where=name,
                expected=f"{promised.dtype} {list(promised.shape)}",
                found=f"{found[0]} {list(tensor.shape)}",
                next_step="mend the recipe's compute function or its plan",
            )
        require_finite(name, tensor)
        data = raw_bytes(tensor)
        path, offset = self._place(name)
        handle = os.open(path, os.O_WRONLY)
        try:
            _pwrite_all(handle, data, offset)
        finally:
            os.close(handle)
        self._marker(name).write_text(blake3(data).hexdigest())

    def shards(self) -> list[str]:
        """Names of the shard files, sorted."""
        return sorted(self._layout)

    def index(self) -> dict[str, Any]:
        """The content of model.safetensors.index.json."""
        total = sum(tensor.size_bytes for tensor in self._plan.values())
        return {"metadata": {"total_size": total}, "weight_map": {name: shard_of(name) for name in sorted(self._plan)}}

    def _place(self, name: str) -> tuple[Path, int]:
        header, _, offsets = self._layout[shard_of(name)]
        return self.directory / shard_of(name), len(header) + offsets[name]

    def _read(self, name: str) -> bytes:
        path, offset = self._place(name)
        with path.open("rb") as held:
            held.seek(offset)
            return held.read(self._plan[name].size_bytes)

    def _marker(self, name: str) -> Path:
        return self._markers / blake3(name.encode()).hexdigest()[:24]


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file, written beside its name and renamed, so that it is whole or absent.

    Raises:  RecipeRefused: a value that is not finite.
    """
    for name in sorted(tensors):
        require_finite(f"{path.name}: {name}", tensors[name])
    specs = [PlannedTensor(n, DTYPE_NAMES[t.dtype], tuple(t.shape), lambda: torch.empty(0)) for n, t in tensors.items()]
    header, _, offsets = _shard_layout(specs)
    partial = path.with_suffix(path.suffix + ".partial")
    with partial.open("wb") as out:
        out.write(header)
        for name in sorted(offsets, key=lambda key: (offsets[key], key)):
            out.write(raw_bytes(tensors[name]))
        out.flush()
        os.fsync(out.fileno())
    partial.rename(path)


_Layout = tuple[bytes, int, dict[str, int]]  # header bytes, data bytes, name -> offset in the data


def _layout(tensors: Sequence[PlannedTensor]) -> dict[str, _Layout]:
    groups: dict[str, list[PlannedTensor]] = {}
    for tensor in tensors:
        groups.setdefault(shard_of(tensor.name), []).append(tensor)
    return {shard: _shard_layout(group) for shard, group in sorted(groups.items())}


def _shard_layout(tensors: Sequence[PlannedTensor]) -> _Layout:
    # Widest dtype first, then by name: every tensor stays aligned, as the stock writer also does.
    ordered = sorted(tensors, key=lambda t: (-_width(t.dtype), t.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, offsets = 0, {}
    for tensor in ordered:
        offsets[tensor.name] = offset
        span = [offset, offset + tensor.size_bytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text, offset, offsets


@cache
def _width(dtype: Dtype) -> int:
    return TORCH_DTYPES[dtype].itemsize


def _pwrite_all(handle: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done : done + (1 << 30)], offset + done)


def iterate_rows(total: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges [start, stop) that cover 0..total."""
    for start in range(0, total, chunk):
        yield start, min(start + chunk, total)
