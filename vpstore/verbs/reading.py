"""open: single tensors of an artifact, each verified as it is read.

Place in the path: behind `vpstore.open`. Where `resolve` promises what it printed at the time it printed it, this
checks each tensor's bytes against its own digest whenever it is read.
Invariants: nothing is returned that does not match; damage never looks like absence; no tensor library is needed, the
bytes come as a memory view. Where there is an index, it says which file a tensor is read from, as it does to others.

Example:
    tensor = vpstore.open("vpDense")["lm_head.weight"]; tensor.dtype, tensor.shape, tensor.data, tensor.torch()
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vpstore import arrays
from vpstore.errors import DigestMismatch, NoSuchTensor
from vpstore.lineage import tensor_rows
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import FileRecord, Manifest
from vpstore.schema.ref import nearest
from vpstore.schema.tensor_table import TensorRow
from vpstore.workspace import Workspace


@dataclass(frozen=True)
class StoredTensor:
    """One tensor's verified bytes, little-endian and row-major as safetensors stores them; an array on request."""

    name: str
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    data: memoryview  # read-only

    def numpy(self) -> arrays.Array:
        """A read-only NumPy array over these bytes; BF16 and 8 bit floats by ml_dtypes.

        Raises:  UsageError: NumPy lacks the dtype, or a package is missing.
        """
        return arrays.numpy_array(self.dtype, self.shape, self.data)

    def torch(self) -> arrays.TorchTensor:
        """A PyTorch tensor on the CPU, over a copy of these bytes. Raises: UsageError, as `numpy`."""
        return arrays.torch_tensor(self.dtype, self.shape, self.data)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> arrays.Array:
        array = self.numpy()
        if dtype is not None and array.dtype != dtype:
            if copy is False:
                raise ValueError(f"{self.name} is {array.dtype}; as {dtype} it has to be copied")
            return array.astype(dtype)
        return array.copy() if copy else array

    def __dlpack__(self, **asked: Any) -> Any:
        return arrays.dlpack(self.dtype, self.shape, self.data, **asked)

    def __dlpack_device__(self) -> tuple[int, int]:
        return arrays.CPU


class Artifact(Mapping[str, StoredTensor]):
    """An artifact's tensors by name."""

    def __init__(self, work: Workspace, manifest: Manifest) -> None:
        self._work, self.manifest = work, manifest

    @cached_property
    def _rows(self) -> dict[str, tuple[FileRecord, TensorRow]]:
        """Where each tensor is.

        Raises:  as `lineage.tensor_places`.
        """
        return tensor_rows(self._work.store, self.manifest)

    def __getitem__(self, name: str) -> StoredTensor:
        """Map and verify one tensor.

        Raises:  NoSuchTensor, which is a KeyError, too; BlobMissing, DigestMismatch: its bytes are not the artifact's.
        """
        if name not in self._rows:
            meant = nearest(name, self._rows) if isinstance(name, str) else None
            raise NoSuchTensor(
                "no such tensor",
                where=str(self.manifest.ref),
                found=str(name),
                next_step=(f"did you mean {meant}? " if meant else "") + f"vpstore show {self.manifest.ref} --tensors",
            )
        file, row = self._rows[name]
        data = self._span(file, row)
        if (found := Digest.of(data)) != row.digest:
            raise DigestMismatch(
                "a tensor does not match its digest",
                where=f"{self.manifest.ref}, {file.path}: {name}",
                expected=row.digest,
                found=found,
                next_step=f"vpstore verify {self.manifest.ref}",
            )
        return StoredTensor(name, row.dtype, row.shape, data)

    def _span(self, file: FileRecord, row: TensorRow) -> memoryview:
        with self._work.store.blobs.open(file.digest) as shard:
            size = shard.seek(0, 2)
            if size < row.end or row.begin == row.end:
                return memoryview(b"")
            return memoryview(mmap.mmap(shard.fileno(), 0, access=mmap.ACCESS_READ))[row.begin : row.end]

    def __contains__(self, name: object) -> bool:
        """Whether the artifact has a tensor of this name; its bytes are not read."""
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        """Tensor names, sorted."""
        return iter(sorted(self._rows))

    def __len__(self) -> int:
        return len(self._rows)
