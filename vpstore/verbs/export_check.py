"""export --check: an exported folder against its record.

Place in the path: after `export`, on any machine; the other half, a fresh export to compare with, is the api's.
Invariants: nothing is written or mended; every file is read; what the record does not name is a fault, too, since a
tool that opens the folder might read it.

Example:
    record = read_record(folder); faults = folder_faults(folder, record)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vpstore.errors import UsageError
from vpstore.schema.export_record import RECORD_FILE, ExportedFile, ExportRecord
from vpstore.schema.fault import Fault
from vpstore.schema.manifest import MANIFEST_FILE, Manifest
from vpstore.storage import atomic

PLAIN: Final = "dir"  # the format of plain files, whose record is the manifest


def read_record(folder: Path) -> ExportRecord:
    """What a folder says of itself: its record, else the manifest of plain files.

    Raises:  UsageError: no folder, or one that `export` did not write; BadManifest: not of its form.
    """
    for name in (RECORD_FILE, MANIFEST_FILE):
        path = folder / name
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            where = f"{folder.name}/{name}"
            return ExportRecord.decode(data, where=where) if name == RECORD_FILE else _plain(data, where)
    raise UsageError(
        "this is no folder that vpstore export has written",
        where=str(folder),
        expected=f"a folder with {RECORD_FILE} or {MANIFEST_FILE}",
        found="one without" if folder.is_dir() else "no folder",
        next_step="name the folder that export printed",
    )


def folder_faults(folder: Path, record: ExportRecord) -> list[Fault]:
    """Every file that is missing, foreign or not what the record says, sorted.

    Raises:  VpstoreError: the disk refuses.
    """
    with atomic.disk_errors(folder, "checking an export"):
        found = dict(_listed(folder))
        own = set() if record.to == PLAIN else {RECORD_FILE}
        faults = [
            Fault(path, found="missing", expected=_text(record.files[path])) for path in record.files.keys() - found
        ]
        faults += [
            Fault(path, "nothing of this name", found[path]) for path in found.keys() - record.files.keys() - own
        ]
        for path in sorted(record.files.keys() & found.keys()):
            faults += _file_faults(folder / path, path, record.files[path], kind=found[path])
    return sorted(faults)


def differing(record: ExportRecord, fresh: ExportRecord) -> list[Fault]:
    """Where a record says otherwise than the one of a fresh export of the same artifact does."""
    faults = []
    if record.ref != fresh.ref:
        faults.append(Fault(RECORD_FILE, f"ref {fresh.ref}", f"ref {record.ref}"))
    for path in sorted(record.files.keys() | fresh.files.keys()):
        was, now = record.files.get(path), fresh.files.get(path)
        if was != now:
            expected = f"{_text(now)}, as it is exported now" if now else "nothing: it is not exported now"
            faults.append(Fault(path, expected, _text(was) if was else "missing"))
    return faults


def _plain(data: bytes, where: str) -> ExportRecord:
    manifest = Manifest.decode(data, where=where)
    files = {row.path: ExportedFile(row.digest, row.size_bytes) for row in manifest.files}
    files[MANIFEST_FILE] = ExportedFile(manifest.digest, len(data))
    return ExportRecord(PLAIN, manifest.ref, manifest.digest, files)


def _listed(folder: Path) -> Iterator[tuple[str, str]]:
    """Every path below a folder that is no directory, and what is there."""
    for parent, names, files in os.walk(folder):
        links = [name for name in names if (Path(parent) / name).is_symlink()]
        for name in [*files, *links]:
            path = Path(parent) / name
            kind = "a link" if path.is_symlink() else "a file" if path.is_file() else "something else"
            yield path.relative_to(folder).as_posix(), kind


def _file_faults(path: Path, name: str, wanted: ExportedFile, *, kind: str) -> Iterator[Fault]:
    if kind != "a file":
        yield Fault(name, "a file", kind)
        return
    size_bytes = path.stat().st_size
    if size_bytes != wanted.size_bytes:
        yield Fault(name, _text(wanted), f"{size_bytes} bytes")
        return
    digest, _ = atomic.digest_file(path)
    if digest != wanted.digest:
        yield Fault(name, wanted.digest, digest)


def _text(row: ExportedFile) -> str:
    return f"{row.digest}, {row.size_bytes} bytes"
