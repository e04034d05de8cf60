"""export: an artifact as a plain directory, for tools and machines that know nothing of a store.

Place in the path: resolve -> **export** -> somebody else. What a view shows by links, an exported directory holds:
the artifact's files and `artifact.json`, each its own, writable and nobody's link.
Invariants: each file is held against its digest while or after it is copied; the directory is whole or absent, under a
hidden temporary name until it is whole; nothing that is there already is overwritten.

A folder of another format has a record of its files, for `export --check`.

Example:
    export(work, manifest, Path("/tmp/vpDense"))
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vpstore.errors import BlobMissing, DigestMismatch, UsageError
from vpstore.schema.digest import Digest
from vpstore.schema.export_record import RECORD_FILE, ExportedFile, ExportRecord
from vpstore.schema.manifest import MANIFEST_FILE, Manifest
from vpstore.schema.paths import check_path
from vpstore.storage import atomic, hashing
from vpstore.workspace import Workspace

_MODE = 0o644  # under the umask, as any new file
_NEXT = "name a new directory outside the store and the weights"


def refuse_target(work: Workspace, target: Path) -> None:
    """Hold the name of the directory against what is there.

    Raises:  UsageError: something is there that is no empty directory, or it lies in the store or among the views.
    """
    try:
        fault, found = _fault(target)
    except OSError as error:  # a name that the file system does not take, or a folder that may not be read
        fault, found = "an absent or empty directory", str(error.strerror)
    weights = work.checkout.root / work.checkout.config.weights  # of every profile, not only of this one
    for place in (work.store.root, weights):
        if Path(os.path.realpath(target)).is_relative_to(os.path.realpath(place)):
            fault, found = "a directory outside the store and the views", work.checkout.relative(place)
    if fault:
        raise UsageError(
            "an artifact cannot be exported there", where=str(target), expected=fault, found=found, next_step=_NEXT
        )


def _fault(target: Path) -> tuple[str, str]:
    wanted = "an absent or empty directory"
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        return wanted, "a link or a file"
    if target.is_dir() and any(target.iterdir()):
        return wanted, "one that is not empty"
    if target.is_mount():
        return "a directory below it", "a mount point, which cannot appear at once"
    nearest = next(folder for folder in target.parents if folder.exists())
    return ("", "") if nearest.is_dir() else ("a directory to put it in", f"{nearest} is a file")


def export(work: Workspace, manifest: Manifest, target: Path) -> None:
    """Write an artifact's files as real files.

    Raises:  UsageError: see `refuse_target`; BlobMissing, DigestMismatch: a blob is not what it should be;
             VpstoreError: the disk refuses.
    """
    refuse_target(work, target)
    files = {MANIFEST_FILE: manifest.digest, **{row.path: row.digest for row in manifest.files}}
    with _appearing(work, manifest, target) as fresh:
        for folder in sorted({(fresh / path).parent for path in files}):
            atomic.make_directory(folder)

        def write(row: tuple[str, Digest]) -> None:
            _write(work, fresh / row[0], row[1], what=f"{manifest.ref}, {row[0]}")

        workers = hashing.WAITERS if len(files) >= hashing.MANY else 1
        for number, _ in enumerate(hashing.in_threads(write, sorted(files.items()), workers=workers)):
            work.narrator.progress("export", number, len(files))
    work.narrator.progress("export", len(files), len(files))


def convert(
    work: Workspace, manifest: Manifest, target: Path, write: Callable[[Path], None], *, to: str
) -> ExportRecord:
    """Have an artifact written in another format, by the project, with a record of every file beside.

    Args:    write: fills an empty folder. to: the format, for the record.
    Raises:  UsageError: see `refuse_target`, or a file that has the record's name; VpstoreError: the disk refuses;
             BadManifest: a name that some system cannot have; whatever `write` raises.
    """
    refuse_target(work, target)
    with _appearing(work, manifest, target) as fresh:
        record = fill(fresh, manifest, write, to=to)
        folders = [path for path in sorted(fresh.rglob("*")) if path.is_dir()]
        for name in (*record.files, RECORD_FILE):  # a folder that appears before its files would be half of one
            atomic.fsync_file(fresh / name)
        for folder in [*folders, fresh]:
            atomic.fsync_directory(folder)
    return record


def fill(fresh: Path, manifest: Manifest, write: Callable[[Path], None], *, to: str) -> ExportRecord:
    """Make a folder, have it filled, and write the record into it. Raises as `convert`."""
    atomic.make_directory(fresh)
    write(fresh)
    files = {}
    for path in sorted(path for path in fresh.rglob("*") if path.is_file()):
        name = check_path(path.relative_to(fresh).as_posix(), where=f"an export to {to}")
        files[name] = ExportedFile(*atomic.digest_file(path))
    if RECORD_FILE in files:
        raise UsageError(
            "an exporter wrote a file of the record's name",
            where=f"--to {to}: {RECORD_FILE}",
            next_step="give it another name in the project's runner",
        )
    record = ExportRecord(to, manifest.ref, manifest.digest, files)
    atomic.write_file(fresh / RECORD_FILE, record.encode(), folder=fresh, mode=_MODE)
    return record


@contextmanager
def aside(work: Workspace, manifest: Manifest) -> Iterator[Path]:
    """A name among the store's unfinished files, for a folder that is compared with another one and removed again."""
    fresh = atomic.temporary_name(work.store.root / "tmp")
    with atomic.disk_errors(fresh, "exporting anew"), work.reading([manifest.digest]):
        try:
            yield fresh
        finally:
            atomic.remove_tree(fresh)


@contextmanager
def _appearing(work: Workspace, manifest: Manifest, target: Path) -> Iterator[Path]:
    """A hidden name for a folder that takes its place at the end, whole; if that fails, nothing is left of it."""
    fresh = atomic.temporary_name(target.parent)
    fresh = fresh.with_name(f".vpstore-export-{fresh.name}")
    with atomic.disk_errors(target, "exporting"), work.reading([manifest.digest]):
        try:
            yield fresh
            _install(fresh, target)
        finally:
            atomic.remove_tree(fresh)


def _write(work: Workspace, path: Path, digest: Digest, *, what: str) -> None:
    """Share the blob's bytes where the file system can, else copy them; either way they are read and compared."""
    blob = work.store.blobs.path(digest)
    try:
        if atomic.clone(blob, path):
            atomic.make_writable(path)
            atomic.fsync_file(path)
            atomic.fsync_directory(path.parent)
            found = atomic.digest_file(path)[0]
        else:
            found = _copy(blob, path)
    except FileNotFoundError:
        next_step = f"vpstore verify {what.split(',')[0]} lists all damage"
        raise BlobMissing("the store does not hold a blob", where=what, expected=digest, next_step=next_step) from None
    if found != digest:
        raise DigestMismatch(
            "a blob does not match its digest",
            where=f"{what}, {blob}",
            expected=digest,
            found=found,
            next_step=f"vpstore verify {what.split(',')[0]} lists all damage",
        )


def _copy(blob: Path, path: Path) -> Digest:
    with atomic.TemporaryFile(path.parent) as out:
        with blob.open("rb", buffering=0) as source:
            buffer = memoryview(bytearray(min(atomic.CHUNK, blob.stat().st_size + 1)))
            while count := source.readinto(buffer):
                out.write(buffer[:count])
        out.commit(path, mode=_MODE)
        return out.digest


def _install(fresh: Path, target: Path) -> None:
    try:
        atomic.rename(fresh, target)  # replaces an empty directory, and nothing else
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise UsageError(
            "somebody else wrote to the directory meanwhile",
            where=str(target),
            expected="an absent or empty directory",
            next_step=_NEXT,
        ) from error
