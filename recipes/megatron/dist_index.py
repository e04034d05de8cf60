"""The index of a torch_dist folder, read without running it, and what says that the folder is of a version known here.

Place in the path: **megatron**; torch_dist reads folders with it.

Invariants: an index is a pickle; only the classes of an index are taken, whatever else it asks for is refused.

Example:
    >>> sorted(read_index(path).state_dict_metadata)[0]
    'decoder.final_layernorm.weight'
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from vpstore.errors import RecipeRefused

INDEX = ".metadata"
BACKEND = "metadata.json"
# What Megatron's loader asks for before anything else.
VERSIONS = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
            "common_backend_version": 1}  # fmt: skip
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


def refuse_other_backend(path: Path) -> None:
    """Hold a folder's metadata.json against what is read here.

    Raises:  RecipeRefused: another format, or another version of it.
    """
    try:
        found = json.loads((path / BACKEND).read_text(encoding="utf-8"))
    except ValueError as error:
        found = f"{type(error).__name__}: {error}"
    told = {key: found.get(key) for key in VERSIONS} if isinstance(found, dict) else found
    if told != VERSIONS:
        raise RecipeRefused(
            "another version of Megatron wrote this, or it keeps its checkpoints in another format",
            where=f"{path.name}/{BACKEND}",
            expected=json.dumps(VERSIONS),
            found=str(found)[:200],
            next_step="save it with --ckpt-format torch_dist in Megatron-Core 0.16 to 0.19",
        )


def read_index(path: Path) -> Metadata:
    """The index of a folder.

    Raises:  RecipeRefused: it cannot be read, or asks for what no index has.
    """
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


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype | torch.layout | torch.memory_format):
            return found
        raise pickle.UnpicklingError(f"an index has no use for {module}.{name}")
