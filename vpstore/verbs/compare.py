"""compare: what was built against what was agreed, down to the tensor.

Place in the path: after a build, before anybody accepts it with `vpstore lock`.
Invariants: works from tensor tables, so it costs the same for an artifact of any size; says when the agreed artifact is
not here to compare with.

Example:
    comparison = compare_with_lock(work, manifest); comparison.status, comparison.tensors
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vpstore.errors import VpstoreError
from vpstore.schema.lockfile import LockEntry
from vpstore.schema.manifest import Manifest
from vpstore.schema.tensor_table import TensorTable
from vpstore.workspace import LockStatus, Workspace


@dataclass(frozen=True)
class Comparison:
    """How an artifact stands to the lock's."""

    status: LockStatus
    reasons: tuple[str, ...] = ()  # which part of the key differs, in words
    files: tuple[str, ...] = ()  # paths that differ, are new or are gone
    tensors: tuple[str, ...] = ()  # tensors that differ, are new or are gone
    tensors_total: int = 0
    is_history: bool = False  # the same content and key, by other ancestors or with other comments in the recipe
    is_known: bool = field(default=True)  # False: the agreed artifact is not here, so files and tensors say nothing

    def sentence(self) -> str:
        """One line for a person."""
        if self.status == "same":
            return "identical to vpstore.lock" + ", but for its history" * self.is_history
        if self.status == "absent":
            return "not in vpstore.lock"
        why = "; ".join(self.reasons)
        if not self.is_known:
            return f"differs from vpstore.lock ({why}); the locked artifact is not here to compare with"
        parts = [f"{len(self.tensors)} of {self.tensors_total} tensors"] if self.tensors_total else []
        parts.append(f"{len(self.files)} files")
        names = self.tensors or self.files
        return f"differs from vpstore.lock ({why}) in {' and '.join(parts)}: {_first(names)}"


def compare_with_lock(work: Workspace, manifest: Manifest) -> Comparison:
    """Compare an artifact with the one the lock names for its ref."""
    entry = work.checkout.lock().entry(work.checkout.profile, manifest.ref)
    if entry is None:
        return Comparison("absent")
    own = LockEntry.of(manifest)
    if entry.is_kept_by(own):
        return Comparison("same", is_history=entry.artifact != manifest.digest)
    reasons = _reasons(entry, own)
    try:
        agreed = work.store.manifest(entry.artifact)
        tensors, total = _differing_tensors(work, agreed, manifest)
    except VpstoreError:
        return Comparison("differs", reasons, is_known=False)
    return Comparison("differs", reasons, _differing_files(agreed, manifest), tensors, total)


def _reasons(agreed: LockEntry, found: LockEntry) -> tuple[str, ...]:
    if agreed.key == found.key:
        return ("same build key, other bytes: another machine or environment, or a build that does not reproduce",)
    reasons = [name for name in ("code", "params") if getattr(agreed, name) != getattr(found, name)]
    return tuple(f"other {name}" for name in reasons) or ("other inputs, sources or pins",)


def _differing_files(agreed: Manifest, found: Manifest) -> tuple[str, ...]:
    paths = sorted(agreed.by_path.keys() | found.by_path.keys())
    return tuple(path for path in paths if agreed.by_path.get(path) != found.by_path.get(path))


def _differing_tensors(work: Workspace, agreed: Manifest, found: Manifest) -> tuple[tuple[str, ...], int]:
    before, after = _tensors(work, agreed), _tensors(work, found)
    names = sorted(before.keys() | after.keys())
    return tuple(name for name in names if before.get(name) != after.get(name)), len(after)


def _tensors(work: Workspace, manifest: Manifest) -> dict[str, tuple[str, tuple[int, ...], str]]:
    tensors: dict[str, tuple[str, tuple[int, ...], str]] = {}
    for row in manifest.files:
        if row.tensors is None:
            continue
        label = f"tensor table of {row.path}"
        table = TensorTable.decode(work.store.blobs.read(row.tensors, what=label), where=label)
        for tensor in table.tensors:
            tensors[tensor.name] = (tensor.dtype, tensor.shape, tensor.digest)
    return tensors


def _first(names: tuple[str, ...], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
