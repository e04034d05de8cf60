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
import os
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

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

from recipes.planned import PlannedTensor
from recipes.tensors import TORCH_DTYPES, raw_bytes, require_finite
from vpstore.errors import RecipeRefused

INDEX = ".metadata"
DATA = "__0_0.distcp"
COMMON = "common.pt"
BACKEND = "metadata.json"
# What Megatron's loader asks for before anything else.
_BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
            "common_backend_version": 1}  # fmt: skip
# Not of the weights: content_metadata says that every layer has keys of its own, so that no flag is needed; without
# `args` a loader takes the run's own.
_COMMON = {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": {"non_homogeneous_layers": True}}
# The classes of an index, by module; whatever else a pickle asks for is refused.
_INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "collections": {"OrderedDict"},
}  # fmt: skip


def write_folder(folder: Path, tensors: Sequence[PlannedTensor], *, states: Sequence[str]) -> dict[str, str]:
    """Write tensors and empty states, each file synced; the folder must be there and empty.

    Args:    tensors: their `name` is the key; states: keys of Megatron's `_extra_state`, which are empty.
    Returns: BLAKE3 of every tensor's bytes as written, by key.
    Raises:  RecipeRefused: a value that is not finite.
    """
    planner = _OneAtATime(tensors)
    meta = {t.name: torch.empty(t.shape, dtype=TORCH_DTYPES[t.dtype], device="meta") for t in tensors}
    with warnings.catch_warnings(action="ignore"):  # that there is one process, which no_dist has said
        content = {**meta, **{key: [None] for key in states}}
        try:
            save(content, storage_writer=_Writer(folder), planner=planner, no_dist=True)
        except CheckpointException as error:  # of all ranks, which is one: what failed stands inside
            raise error.failures[0][0] from None
    for name, data in ((BACKEND, json.dumps(_BACKEND).encode()), (COMMON, _saved(_COMMON))):
        with (folder / name).open("xb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
    _sync_directory(folder)
    return planner.digests


def _saved(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def _sync_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _OneAtATime(DefaultSavePlanner):
    """Plans with tensors on the meta device, and computes each when it is written."""

    def __init__(self, tensors: Sequence[PlannedTensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self.digests: dict[str, str] = {}

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """The tensor, computed now; an empty state as bytes."""
        key = write_item.index.fqn
        if write_item.type == WriteItemType.BYTE_IO:
            return cast(io.BytesIO, super().resolve_data(write_item))
        tensor = self._tensors[key].compute().contiguous()
        require_finite(key, tensor)
        self.digests[key] = f"blake3:{blake3(raw_bytes(tensor)).hexdigest()}"
        return tensor


class _Writer(FileSystemWriter):
    """One data file, item by item: the stock writer keeps every tensor of a file until the file is closed."""

    def storage_meta(self) -> StorageMeta:
        """Nothing: the stock one holds a path of this machine and a random number."""
        return StorageMeta()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the items in the order of the plan."""
        results = []
        with (Path(self.path) / DATA).open("xb") as out:
            for item in plan.items:
                data, offset = planner.resolve_data(item), out.tell()
                if isinstance(data, io.BytesIO):
                    out.write(data.getbuffer())
                else:
                    # A view of a larger storage would be saved with all of it.
                    is_part = data.untyped_storage().nbytes() != data.nbytes
                    torch.save(data.clone() if is_part else data, out)
                size = out.tell() - offset
                results.append(WriteResult(item.index, size, _StorageInfo(DATA, offset, size)))
            out.flush()
            os.fsync(out.fileno())
        done: Future[list[WriteResult]] = Future()
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
        _refuse_other_backend(path)
        self._reader = _Reader(path, _index(path))

    @property
    def _entries(self) -> Mapping[str, Any]:
        return self._reader.index.state_dict_metadata

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every tensor, by key."""
        return {
            key: (entry.properties.dtype, tuple(entry.size))
            for key, entry in self._entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def data_files(self) -> set[str]:
        """Names of the files that hold the data, relative to the folder, as the index has them."""
        stored = self._reader.index.storage_data or {}
        return {str(where.relative_path) for where in stored.values()}

    def states(self) -> list[str]:
        """Keys of what is no tensor."""
        return sorted(self._entries.keys() - self.tensors().keys())

    def read(self, key: str) -> Tensor:
        """The whole tensor, joined from its parts.

        Raises:  RecipeRefused: no such tensor, or data that cannot be read.
        """
        found = self.tensors().get(key)
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


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype | torch.layout | torch.memory_format):
            return found
        raise pickle.UnpicklingError(f"an index has no use for {module}.{name}")


def _refuse_other_backend(path: Path) -> None:
    try:
        found = json.loads((path / BACKEND).read_text(encoding="utf-8"))
    except ValueError as error:
        found = f"{type(error).__name__}: {error}"
    told = {key: found.get(key) for key in _BACKEND} if isinstance(found, dict) else found
    if told != _BACKEND:
        raise RecipeRefused(
            "another version of Megatron wrote this, or it keeps its checkpoints in another format",
            where=f"{path.name}/{BACKEND}",
            expected=json.dumps(_BACKEND),
            found=str(found)[:200],
            next_step="save it with --ckpt-format torch_dist in Megatron-Core 0.16 to 0.19",
        )


def _index(path: Path) -> Metadata:
    try:
        with (path / INDEX).open("rb") as held:
            found = _IndexUnpickler(held).load()
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as error:
        raise RecipeRefused(
            "the index of a torch_dist folder cannot be read",
            where=f"{path.name}/{INDEX}",
            expected="what torch.distributed.checkpoint writes",
            found=f"{type(error).__name__}: {error}"[:300],
            next_step="copy the folder again, and take it only from somebody you trust",
        ) from error
    if not isinstance(found, Metadata):
        raise RecipeRefused("the index of a torch_dist folder is none", where=f"{path.name}/{INDEX}")
    return found
