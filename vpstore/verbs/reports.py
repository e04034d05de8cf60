"""Reports: an artifact's files under `reports/` put where DVC and git see them.

Place in the path: after the view, before the pointer; on a build and on a cache hit alike.
Invariants: an equal file is not touched. Only what a build wrote is removed or replaced: a file at a path, and to be
removed with the very bytes, of the artifact that the pointer or the lock names. Whatever else lies in the folder is a
person's and stays; where it is in the way it is kept aside as `….changed-…`. No link is followed out of the checkout.

Example:
    restore_reports(work, manifest)
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vpstore.errors import VpstoreError
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import FileRecord, Manifest
from vpstore.schema.objects import Summary
from vpstore.schema.ref import StageRef
from vpstore.storage import atomic, beneath
from vpstore.workspace import Workspace

PREFIX: Final = "reports/"


def restore_reports(work: Workspace, manifest: Manifest) -> int:
    """Make `reports/<profile>/<object>-<stage>/` show what the artifact reports. Called before the pointer is written.

    Returns: how many files were written.
    Raises:  VpstoreError: the folder is not the checkout's own, see `storage.beneath`; the disk refuses.
    """
    folder = work.checkout.reports_of(manifest.ref)
    rows = _rows(manifest)
    earlier = _earlier(work, manifest.ref)
    written = 0
    with atomic.disk_errors(folder, "writing reports"):
        # First, as a path may have been a file and be a folder now. Whatever happens, the next build goes on from here.
        _remove_earlier(work, folder, {name: row for name, row in earlier.digests.items() if name not in rows})
        for name, row in rows.items():
            data = work.store.blobs.read(row.digest, what=f"{manifest.ref}, {row.path}")
            path = folder / name
            with work.checkout.opened(path.parent) as place:
                _make_way(work, path, place / path.name, is_ours=name in earlier.digests or earlier.is_unknown)
                written += atomic.write_if_different(place / path.name, data)
    return written


def _rows(manifest: Manifest) -> dict[str, FileRecord]:
    return {row.path.removeprefix(PREFIX): row for row in manifest.files if row.path.startswith(PREFIX)}


@dataclass
class _Earlier:
    """What earlier builds of a stage have written into its folder, as far as manifests tell."""

    digests: dict[str, set[Digest]] = field(default_factory=dict)
    is_unknown: bool = False  # there were builds, but no manifest of one can be read here, as in a fresh clone


def _earlier(work: Workspace, ref: StageRef) -> _Earlier:
    """The reports of the artifacts that the pointer, which is still the last build's, and the lock name."""
    found = _Earlier()
    is_read = False
    seen: set[Digest | None] = {None}
    for name in (_pointed, _locked):
        try:
            if (artifact := name(work, ref)) in seen or artifact is None:
                continue
            seen.add(artifact)
            manifest = work.store.manifest(artifact)
        except VpstoreError:
            found.is_unknown = True
            continue
        if manifest.ref == ref:
            is_read = True
            for path, row in _rows(manifest).items():
                found.digests.setdefault(path, set()).add(row.digest)
    found.is_unknown &= not is_read
    return found


def _pointed(work: Workspace, ref: StageRef) -> Digest | None:
    pointer = work.checkout.pointers.read(ref)
    return None if pointer is None else pointer.artifact


def _locked(work: Workspace, ref: StageRef) -> Digest | None:
    entry = work.checkout.lock().entry(work.checkout.profile, ref)
    return None if entry is None else entry.artifact


def _make_way(work: Workspace, path: Path, place: Path, *, is_ours: bool) -> None:
    """Keep aside what lies where a report goes, unless a build wrote it or the store has its bytes.

    Args:    path: as a person knows it; place: the same in its folder held open; is_ours: a build wrote at this path.
    """
    if not os.path.lexists(place):
        return
    if stat.S_ISREG(place.lstat().st_mode) and (is_ours or work.store.blobs.has(atomic.digest_file(place)[0])):
        return
    aside = place.with_name(f"{place.name}.changed-{atomic.temporary_name(place.parent).name}")
    atomic.rename(place, aside)
    shown, kept = (work.checkout.relative(path.with_name(name.name)) for name in (place, aside))
    work.narrator.warn(f"{shown} was no report of a build; kept as {kept}")


def _remove_earlier(work: Workspace, folder: Path, digests: Mapping[str, Collection[Digest]]) -> None:
    """Remove the reports of earlier builds that the artifact does not have, and folders that this leaves empty.

    What has other bytes than any of them had is a person's by now: it stays, and that is said.
    """
    edited = []
    for name, known in sorted(digests.items()):
        path = folder / name
        try:
            with beneath.opened(work.checkout.root, path.parent, create=False) as place:
                lies = place / path.name
                if not os.path.lexists(lies):
                    continue
                if not stat.S_ISREG(lies.lstat().st_mode) or atomic.digest_file(lies)[0] not in known:
                    edited.append(name)
                    continue
                atomic.remove(lies)
        except FileNotFoundError:
            continue
        _remove_empty(work, folder, path.parent)
    if edited:
        work.narrator.warn(
            f"{work.checkout.relative(folder)}: the artifact has no {', '.join(edited[:5])}; "
            "kept, as it is not what a build wrote"
        )


def _remove_empty(work: Workspace, folder: Path, inner: Path) -> None:
    """Remove the folders from `inner` up to `folder`, without it, that have nothing in them."""
    while inner != folder:
        with beneath.opened(work.checkout.root, inner.parent, create=False) as place:
            if (place / inner.name).is_symlink() or not atomic.remove_if_empty(place / inner.name):
                return
        inner = inner.parent


def summary_value(work: Workspace, ref: StageRef, summary: Summary) -> Any:
    """The figure for one stage out of another object's report, or None if there is no such report or key.

    The object `summary.source` reports about `X@Y` in its own stage `X-Y`.
    """
    path = work.checkout.reports_of(StageRef(summary.source, ref.slug)) / summary.file
    value = _read(path)
    for part in summary.key.split("."):
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    return value if isinstance(value, (int, float, str)) else None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
