"""Filling the shards of a plan: in any order, in pieces, by any number of threads and processes, resumable.

Place in the path: tensors -> **shards** -> publish. It decides bytes and is part of every recipe's code closure.

Invariants: a shard's bytes depend only on the names, dtypes, shapes and values of its tensors; its layout is known
before a tensor is computed, so tensors can be written in any order by any number of processes. A tensor counts as done
only if the digest in its marker is that of the bytes in the shard: a torn write is computed again, never published.

Example:
    >>> writer = ShardWriter(scratch / "shards", plan.tensors)
    >>> writer.prepare()
    >>> writer.write("model.norm.weight", torch.ones(64, dtype=torch.bfloat16))
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3
from torch import Tensor

from recipes.names import shard_of
from recipes.planned import PlannedTensor
from recipes.shard_layout import layouts_of
from recipes.tensors import DTYPE_NAMES, PIECE_BYTES, raw_bytes, require_finite
from vpstore.errors import RecipeRefused


class ShardWriter:
    """Lays out shards for tensors of known shape and fills them in any order; see the module's invariants."""

    def __init__(self, directory: Path, tensors: Sequence[PlannedTensor]) -> None:
        self.directory = directory
        self._markers = directory.parent / (directory.name + ".done")
        self._plan = {tensor.name: tensor for tensor in tensors}
        self._layout = layouts_of(tensors)
        directory.mkdir(parents=True, exist_ok=True)
        self._markers.mkdir(parents=True, exist_ok=True)

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards together, headers included."""
        return sum(len(layout.header) + layout.data_bytes for layout in self._layout.values())

    def prepare(self) -> None:
        """Create each shard at its full length with its header; a shard that already has both is kept."""
        for shard, layout in self._layout.items():
            path, size = self.directory / shard, len(layout.header) + layout.data_bytes
            if path.exists() and path.stat().st_size == size:
                with path.open("rb") as held:
                    if held.read(len(layout.header)) == layout.header:
                        continue
            with path.open("wb") as out:
                out.write(layout.header)
                out.truncate(size)

    def is_done(self, name: str) -> bool:
        """Whether the bytes in the shard are those that a finished computation put there."""
        marker = self._marker(name)
        return marker.exists() and marker.read_text() == self._digest(name)

    def write(self, name: str, value: Tensor | Iterable[Tensor]) -> None:
        """Put a computed tensor in its place.

        Args:    value: whole, or as consecutive ranges of its first dimension.
        Raises:  RecipeRefused: another dtype or shape than planned, or a value that is not finite.
        """
        promised = self._plan[name]
        path, offset = self._place(name)
        state, rows = blake3(), 0
        handle = os.open(path, os.O_WRONLY)
        try:
            for part in [value] if isinstance(value, Tensor) else value:
                rows += _promised_rows(promised, part, done=None if part is value else rows)
                require_finite(name, part)
                data = raw_bytes(part)
                _pwrite_all(handle, data, offset)
                state.update(data)
                offset += len(data)
        finally:
            os.close(handle)
        if promised.shape and rows != promised.shape[0]:
            raise _not_promised(promised, f"{rows} rows")
        self._marker(name).write_text(state.hexdigest())

    def shards(self) -> list[str]:
        """Names of the shard files, sorted."""
        return sorted(self._layout)

    def index(self) -> dict[str, Any]:
        """The content of model.safetensors.index.json."""
        total = sum(tensor.size_bytes for tensor in self._plan.values())
        return {"metadata": {"total_size": total}, "weight_map": {name: shard_of(name) for name in sorted(self._plan)}}

    def _place(self, name: str) -> tuple[Path, int]:
        layout = self._layout[shard_of(name)]
        return self.directory / shard_of(name), len(layout.header) + layout.offsets[name]

    def _digest(self, name: str) -> str:
        path, offset = self._place(name)
        state, left = blake3(), self._plan[name].size_bytes
        with path.open("rb", buffering=0) as held:
            held.seek(offset)
            while left and (data := held.read(min(left, PIECE_BYTES))):
                state.update(data)
                left -= len(data)
        return state.hexdigest()

    def _marker(self, name: str) -> Path:
        return self._markers / blake3(name.encode()).hexdigest()[:24]


def _promised_rows(promised: PlannedTensor, part: Tensor, *, done: int | None) -> int:
    """How many rows of the promised tensor a part is, `done` of which are written; None: it must be the whole."""
    is_part = done is not None and part.dim() > 0 and len(part) <= promised.shape[0] - done
    expected = (*part.shape[:1], *promised.shape[1:]) if is_part else promised.shape
    if (DTYPE_NAMES.get(part.dtype), tuple(part.shape)) != (promised.dtype, expected):
        raise _not_promised(promised, f"{DTYPE_NAMES.get(part.dtype)} {list(part.shape)}")
    return len(part) if part.dim() else 1


def _not_promised(promised: PlannedTensor, found: str) -> RecipeRefused:
    return RecipeRefused(
        "a recipe computed another tensor than it planned",
        where=promised.name,
        expected=f"{promised.dtype} {list(promised.shape)}",
        found=found,
        next_step="mend the recipe's compute function or its plan",
    )


def _pwrite_all(handle: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done : done + (1 << 30)], offset + done)
