"""A torch_dist folder, as Megatron keeps its checkpoints, by torch.distributed.checkpoint alone.

Place in the path: layout -> **megatron** -> Megatron. Written one tensor at a time; read one tensor at a time, from
folders of any number of ranks.

Invariants: one tensor is in memory at a time; every file is on the disk before the folder counts as written; reading
runs no code of the folder: the index is a pickle, of which only the classes of an index are taken.

Example:
    >>> digests = write_folder(path, tensors, states=extra_states(config))
    >>> Folder(path).read("decoder.final_layernorm.weight").shape
    torch.Size([64])
"""

from __future__ import annotations

import io
import json
import math
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from blake3 import blake3
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.utils.serialization import config

from recipes.megatron.dist_index import BACKEND, INDEX, VERSIONS, read_index, refuse_other_backend
from recipes.planned import PlannedTensor
from recipes.tensors import TORCH_DTYPES, raw_bytes, require_finite
from vpstore.errors import RecipeRefused

DATA = "__0_0.distcp"
COMMON = "common.pt"
# Not of the weights: content_metadata says that every layer has keys of its own, so that no flag is needed; without
# `args` a loader takes the run's own.
_COMMON = {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": {"non_homogeneous_layers": True}}


def write_folder(
    folder: Path, tensors: Sequence[PlannedTensor], *, states: Sequence[str], stacks: Collection[str] = ()
) -> dict[str, str]:
    """Write tensors and empty states, each file synced; the folder must be there and empty.

    Args:    tensors: their `name` is the key; states: keys of Megatron's `_extra_state`, which are empty; stacks: keys
             of tensors that are read one index of the first dimension at a time, and are written so: a reader loads
             whole pieces, and would load a stack once for each of its experts.
    Returns: BLAKE3 of every tensor's bytes as written, by key.
    Raises:  RecipeRefused: a value that is not finite.
    """
    planner = _OneAtATime(tensors, stacks)
    meta = {t.name: torch.empty(t.shape, dtype=TORCH_DTYPES[t.dtype], device="meta") for t in tensors}
    with warnings.catch_warnings(action="ignore"):  # that there is one process, which no_dist has said
        content = {**meta, **{key: [None] for key in states}}
        try:
            save(content, storage_writer=_Writer(folder), planner=planner, no_dist=True)
        except CheckpointException as error:  # of all ranks, which is one: what failed stands inside
            raise error.failures[0][0] from None
    for name, data in ((BACKEND, json.dumps(VERSIONS).encode()), (COMMON, _saved(_COMMON))):
        with (folder / name).open("xb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
    _sync_directory(folder)
    return planner.digests


def _saved(value: Any) -> bytes:
    out = io.BytesIO()
    _save(value, out)
    return out.getvalue()


def _save(value: Any, out: IO[bytes]) -> None:
    with config.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]
        torch.save(value, out)


def _sync_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _OneAtATime(DefaultSavePlanner):
    """Plans with tensors on the meta device, and computes each when it is written."""

    def __init__(self, tensors: Sequence[PlannedTensor], stacks: Collection[str]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors, self._stacks = {tensor.name: tensor for tensor in tensors}, set(stacks)
        self._current: tuple[str, Tensor] | None = None
        self._state = _saved([None])  # every empty state; there are two for each expert
        self.digests: dict[str, str] = {}

    def create_local_plan(self) -> SavePlan:
        """As the stock planner's, with stacks cut."""
        plan = super().create_local_plan()
        items = [piece for item in plan.items for piece in self._pieces(item)]
        return replace(plan, items=items)

    def _pieces(self, item: WriteItem) -> list[WriteItem]:
        data = item.tensor_data
        if item.index.fqn not in self._stacks or data is None:
            return [item]
        sizes, rest = torch.Size([1, *data.size[1:]]), [0] * (len(data.size) - 1)
        pieces = []
        for number in range(data.size[0]):
            place = torch.Size([number, *rest])
            index = replace(item.index, offset=place, index=number)
            chunk = replace(data.chunk, offsets=place, sizes=sizes)
            shard = WriteItemType.SHARD
            pieces.append(replace(item, index=index, type=shard, tensor_data=replace(data, chunk=chunk)))
        return pieces

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """The tensor, computed now; an empty state as bytes."""
        key = write_item.index.fqn
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._state)
        if self._current is None or self._current[0] != key:  # pieces of a stack follow each other
            tensor = self._tensors[key].compute().contiguous()
            if tensor.untyped_storage().nbytes() != tensor.nbytes:
                tensor = tensor.clone()  # a view would be saved with the whole of its storage
            # A sum says so in one reading; one that runs over is looked at number by number.
            if not math.isfinite(tensor.sum().item()):
                require_finite(key, tensor)
            self.digests[key] = f"blake3:{blake3(raw_bytes(tensor)).hexdigest()}"
            self._current = key, tensor
        whole = self._current[1]
        if key not in self._stacks or write_item.index.offset is None:
            return whole
        number = write_item.index.offset[0]
        size = whole[number].nbytes
        # The same bytes as a storage of their own: a view would be saved with the whole of its storage.
        piece = torch.frombuffer(raw_bytes(whole)[number * size : (number + 1) * size], dtype=whole.dtype)
        return piece.reshape(1, *whole.shape[1:])


class _Writer(FileSystemWriter):
    """One data file, item by item: the stock writer keeps every tensor of a file until the file is closed."""

    def storage_meta(self) -> StorageMeta:
        """Nothing: the stock one holds a path of this machine and a random number."""
        return StorageMeta()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the items in the order of the plan."""
        results, moulds = [], _Moulds()
        with (Path(self.path) / DATA).open("xb") as out:
            for item in plan.items:
                data, offset = planner.resolve_data(item), out.tell()
                if isinstance(data, io.BytesIO):
                    out.write(data.getbuffer())
                elif item.type == WriteItemType.SHARD:
                    out.writelines(moulds.pieces(data))
                else:
                    _save(data, out)
                size = out.tell() - offset
                results.append(WriteResult(item.index, size, _StorageInfo(DATA, offset, size)))
            out.flush()
            os.fsync(out.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


class _Moulds:
    """What `torch.save` puts before and behind the bytes of a tensor: the same for all of one dtype and shape.

    Some 80,000 pieces of experts have six shapes; saving each by itself takes as long as writing its bytes. So that
    nothing else depends on the bytes, the zip's checksums are left out, which no reader of torch looks at.
    """

    def __init__(self) -> None:
        self._around: dict[tuple[torch.dtype, torch.Size], tuple[bytes, bytes]] = {}

    def pieces(self, tensor: Tensor) -> tuple[bytes, memoryview, bytes]:
        """What `torch.save` writes of a contiguous tensor that has its storage for itself."""
        data, kind = raw_bytes(tensor), (tensor.dtype, tensor.shape)
        if kind not in self._around:
            zeros, ones = (_saved(_filled(tensor, byte)) for byte in (0, 255))
            begin = next(place for place, (one, other) in enumerate(zip(zeros, ones, strict=True)) if one != other)
            end = begin + len(data)
            assert zeros[:begin] + zeros[end:] == ones[:begin] + ones[end:]
            self._around[kind] = zeros[:begin], zeros[end:]
        before, behind = self._around[kind]
        return before, data, behind


def _filled(like: Tensor, byte: int) -> Tensor:
    """A tensor all of whose bytes are the same."""
    return torch.full((like.nbytes,), byte, dtype=torch.uint8).view(like.dtype).reshape(like.shape)


class Folder:
    """Reads a torch_dist folder of any writer; see the module's invariants."""

    def __init__(self, path: Path) -> None:
        """Read the index.

        Raises:  RecipeRefused: no torch_dist folder, or an index that asks for code.
        """
        self.path = path
        absent = [name for name in (INDEX, BACKEND) if not (path / name).is_file()]
        if absent:
            raise RecipeRefused(
                "this is no torch_dist folder",
                where=path.name,
                expected=", ".join((INDEX, BACKEND, "*.distcp")),
                found=f"without {', '.join(absent)}",
                next_step="name the folder of one iteration, release/ or iter_0000000/",
            )
        refuse_other_backend(path)
        self._reader = _Reader(path, read_index(path))
        self._entries: Mapping[str, Any] = self._reader.index.state_dict_metadata
        self._tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            key: (entry.properties.dtype, tuple(entry.size))
            for key, entry in self._entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every tensor, by key."""
        return dict(self._tensors)

    def data_files(self) -> set[str]:
        """Names of the files that hold the data, relative to the folder, as the index has them."""
        stored = self._reader.index.storage_data or {}
        return {str(where.relative_path) for where in stored.values()}

    def states(self) -> list[str]:
        """Keys of what is no tensor."""
        return sorted(self._entries.keys() - self._tensors.keys())

    def read(self, key: str) -> Tensor:
        """The whole tensor, joined from its parts.

        Raises:  RecipeRefused: no such tensor, or data that cannot be read.
        """
        found = self._tensors.get(key)
        if found is None:
            raise RecipeRefused("a checkpoint of Megatron has no tensor of this key", where=f"{self.path.name}: {key}")
        value = {key: torch.empty(found[1], dtype=found[0])}
        try:
            with warnings.catch_warnings(action="ignore"):  # that there is one process, which no_dist has said
                load(value, storage_reader=self._reader, no_dist=True)
        except CheckpointException as error:
            reason = error.failures[0][0]
            raise RecipeRefused(
                "a tensor of a Megatron checkpoint cannot be read",
                where=f"{self.path.name}: {key}",
                found=f"{type(reason).__name__}: {reason}"[:300],
                next_step="copy the folder again; Megatron can load it only if all its files are whole",
            ) from error
        return value[key]


class _Reader(FileSystemReader):
    """The stock reader, with an index that was read already, and not by running it."""

    def __init__(self, path: Path, index: Metadata) -> None:
        super().__init__(path)
        self.index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index."""
        return self.index
