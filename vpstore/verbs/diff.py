"""diff: two artifacts tensor by tensor and file by file.

Place in the path: a reading verb; what differs is found in the tensor tables, how much in the tensors' bytes.
Invariants: bytes are mapped and held against their own digest before a figure is made of them; equal digests are equal
tensors and cost no reading; a tensor is compared with the one of its name, whichever shards they lie in.

Example:
    found = diff(work, before, after, tensors=(Artifact(work, before), Artifact(work, after)))
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from vpstore.lineage import tensor_rows
from vpstore.numbers import TensorDifference, compare_tensors
from vpstore.schema.manifest import FileRecord, Manifest
from vpstore.schema.tensor_table import TensorRow
from vpstore.workspace import Workspace

Status = Literal["identical", "differs", "dtype", "shape", "only before", "only after"]


class HasData(Protocol):
    """One tensor's verified bytes."""

    @property
    def data(self) -> memoryview:
        """The bytes, read-only."""


@dataclass(frozen=True)
class TensorPair:
    """One tensor name in two artifacts."""

    name: str
    status: Status
    before: TensorRow | None
    after: TensorRow | None
    difference: TensorDifference | None = None  # of tensors of one dtype and shape that differ

    def to_json(self) -> dict[str, Any]:
        """The pair as `diff --json` prints it; an infinite figure is the text "inf"."""
        figures = self.difference.__dict__ if self.difference is not None else {}
        names = ("max_abs", "max_rel", "norm_before", "norm_after", "norm_difference")
        return {
            "name": self.name,
            "status": self.status,
            "before": _described(self.before),
            "after": _described(self.after),
            **{name: _figure(figures.get(name)) for name in names},
        }


@dataclass(frozen=True)
class FilePair:
    """One path in two artifacts."""

    path: str
    status: Status
    before: FileRecord | None
    after: FileRecord | None

    def to_json(self) -> dict[str, Any]:
        """The pair as `diff --json` prints it."""
        left, right = (
            row and {"digest": row.digest, "size_bytes": row.size_bytes} for row in (self.before, self.after)
        )
        return {"path": self.path, "status": self.status, "before": left, "after": right}


@dataclass(frozen=True)
class Difference:
    """Two artifacts side by side, sorted by name."""

    before: Manifest
    after: Manifest
    tensors: tuple[TensorPair, ...]
    files: tuple[FilePair, ...]

    @property
    def is_identical(self) -> bool:
        """Whether no tensor and no file differs."""
        statuses = {pair.status for pair in self.tensors} | {pair.status for pair in self.files}
        return statuses <= {"identical"}


def diff(
    work: Workspace,
    before: Manifest,
    after: Manifest,
    *,
    tensors: tuple[Mapping[str, HasData], Mapping[str, HasData]],
) -> Difference:
    """Compare two artifacts.

    Args:    tensors: what reads and verifies the tensors of each.
    Raises:  BlobMissing, DigestMismatch, BadManifest: a table or a tensor is missing or damaged.
    """
    pairs = list(_matched(work, before, after))
    measured = []
    for number, pair in enumerate(pairs):
        work.narrator.progress("diff", number, len(pairs))
        measured.append(_measured(pair, tensors))
    work.narrator.progress("diff", len(pairs), len(pairs))
    return Difference(before, after, tuple(measured), tuple(_files(before, after)))


def _matched(work: Workspace, before: Manifest, after: Manifest) -> Iterator[TensorPair]:
    left = {name: row for name, (_, row) in tensor_rows(work.store, before).items()}
    right = {name: row for name, (_, row) in tensor_rows(work.store, after).items()}
    for name in sorted(left.keys() | right.keys()):
        yield TensorPair(name, _status(left.get(name), right.get(name)), left.get(name), right.get(name))


def _status(before: TensorRow | None, after: TensorRow | None) -> Status:
    if before is None:
        return "only after"
    if after is None:
        return "only before"
    if before.dtype != after.dtype:
        return "dtype"
    if before.shape != after.shape:
        return "shape"
    return "identical" if before.digest == after.digest else "differs"


def _measured(pair: TensorPair, tensors: tuple[Mapping[str, HasData], Mapping[str, HasData]]) -> TensorPair:
    if pair.status != "differs" or pair.before is None:
        return pair
    left, right = (side[pair.name].data for side in tensors)
    difference = compare_tensors(pair.before.dtype, left, right)
    return TensorPair(pair.name, pair.status, pair.before, pair.after, difference)


def _files(before: Manifest, after: Manifest) -> Iterator[FilePair]:
    for path in sorted(before.by_path.keys() | after.by_path.keys()):
        left, right = before.by_path.get(path), after.by_path.get(path)
        status: Status = "only after" if left is None else "only before" if right is None else "differs"
        if left is not None and right is not None and left.digest == right.digest:
            status = "identical"
        yield FilePair(path, status, left, right)


def _described(row: TensorRow | None) -> dict[str, Any] | None:
    return None if row is None else {"dtype": row.dtype, "shape": list(row.shape), "digest": row.digest}


def _figure(value: float | None) -> float | str | None:
    return "inf" if value is not None and math.isinf(value) else value
