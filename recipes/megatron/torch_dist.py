"""A torch_dist folder, as Megatron keeps its checkpoints, by torch.distributed.checkpoint alone.

Place in the path: layout -> **megatron** -> Megatron. Written one tensor at a time; read one tensor at a time, from
folders of any number of ranks.

Invariants: two tensors are in memory at a time, one written and one computed; every file is on the disk before the
folder counts as written; reading runs no code of the folder: the index is a pickle, of which only the classes of an
index are taken.

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
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from recipes.megatron.dist_index import BACKEND, INDEX, VERSIONS, read_index, refuse_other_backend
from recipes.megatron.moulds import Moulds, saved
from recipes.megatron.moulds import save as save_whole
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
    planner = _OneAhead(tensors, stacks)
    meta = {t.name: torch.empty(t.shape, dtype=TORCH_DTYPES[t.dtype], device="meta") for t in tensors}
    with warnings.catch_warnings(action="ignore"):  # that there is one process, which no_dist has said
        content = {**meta, **{key: [None] for key in states}}
        try:
            save(content, storage_writer=_Writer(folder), planner=planner, no_dist=True)
        except CheckpointException as error:  # of all ranks, which is one: what failed stands inside
            raise error.failures[0][0] from None
        finally:
            planner.close()
    for name, data in ((BACKEND, json.dumps(VERSIONS).encode()), (COMMON, saved(_COMMON))):
        with (folder / name).open("xb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
    _sync_directory(folder)
    return planner.digests


def _sync_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _OneAhead(DefaultSavePlanner):
    """Plans with tensors on the meta device, and computes each while the one before is written."""

    def __init__(self, tensors: Sequence[PlannedTensor], stacks: Collection[str]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors, self._stacks = {tensor.name: tensor for tensor in tensors}, set(stacks)
        self._next: dict[str, str] = {}  # key -> the one behind it in the plan
        self._thread = ThreadPoolExecutor(1)
        self._ahead: tuple[str, Future[Tensor]] | None = None
        self._current: tuple[str, Tensor] | None = None
        self._state = saved([None])  # every empty state; there are two for each expert
        self.digests: dict[str, str] = {}

    def create_local_plan(self) -> SavePlan:
        """As the stock planner's, with stacks cut."""
        plan = super().create_local_plan()
        items = [piece for item in plan.items for piece in self._pieces(item)]
        keys = [item.index.fqn for item in plan.items if item.type != WriteItemType.BYTE_IO]
        self._next = dict(pairwise(keys))
        return replace(plan, items=items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Of the one plan that there is, which needs no search for pieces that overlap: each is held against each."""
        self.global_plan, self.metadata = create_default_global_save_plan(all_plans)
        return self.global_plan, self.metadata

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
            self._current = key, self._taken(key)
        whole = self._current[1]
        if key not in self._stacks or write_item.index.offset is None:
            return whole
        number = write_item.index.offset[0]
        size = whole[number].nbytes
        # The same bytes as a storage of their own: a view would be saved with the whole of its storage.
        piece = torch.frombuffer(raw_bytes(whole)[number * size : (number + 1) * size], dtype=whole.dtype)
        return piece.reshape(1, *whole.shape[1:])

    def _taken(self, key: str) -> Tensor:
        """The tensor of a key; that of the next one is begun."""
        waiting = self._ahead if self._ahead and self._ahead[0] == key else None
        tensor = waiting[1].result() if waiting else self._computed(key)
        after = self._next.get(key)
        self._ahead = None if after is None else (after, self._thread.submit(self._computed, after))
        return tensor

    def _computed(self, key: str) -> Tensor:
        tensor = self._tensors[key].compute().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # a view would be saved with the whole of its storage
        # A sum says so in one reading; one that runs over is looked at number by number.
        if not math.isfinite(tensor.sum().item()):
            require_finite(key, tensor)
        self.digests[key] = f"blake3:{blake3(raw_bytes(tensor)).hexdigest()}"
        return tensor

    def close(self) -> None:
        """Let go of the thread and of what it holds."""
        self._thread.shutdown(cancel_futures=True)
        self._ahead = self._current = None


class _Writer(FileSystemWriter):
    """One data file, item by item: the stock writer keeps every tensor of a file until the file is closed."""

    def storage_meta(self) -> StorageMeta:
        """Nothing: the stock one holds a path of this machine and a random number."""
        return StorageMeta()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        """Write the items in the order of the plan."""
        results, moulds = [], Moulds()
        with (Path(self.path) / DATA).open("xb") as out:
            for item in plan.items:
                data, offset = planner.resolve_data(item), out.tell()
                if isinstance(data, io.BytesIO):
                    out.write(data.getbuffer())
                elif item.type == WriteItemType.SHARD:
                    out.writelines(moulds.pieces(data))
                else:
                    save_whole(data, out)
                size = out.tell() - offset
                results.append(WriteResult(item.index, size, _StorageInfo(DATA, offset, size)))
            out.flush()
            os.fsync(out.fileno())
        done: TorchFuture[list[WriteResult]] = TorchFuture()
        done.set_result(results)
        return done


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
