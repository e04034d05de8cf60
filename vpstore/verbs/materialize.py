"""materialize: show an artifact's files as a directory, and notice when the directory no longer shows them.

Place in the path: resolve -> **view** -> whoever reads checkpoints. A view is named by its artifact's digest and holds
the artifact's files, `artifact.json` (the manifest), and beside it a file of its attestations.
Invariants: never a hard link; reflink where the file system has it, else symbolic link, else copy; a view appears
whole; whatever lies in its place and was not made here is set aside, not deleted, before a new one takes that place; no
link is followed out of a view, nor out of the checkout to the place of one; the store need only be readable.

Example:
    path = materialize(work, manifest)
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final

from vpstore.errors import VpstoreError
from vpstore.holdings import linked_blob, view_name
from vpstore.schema.attestation import Statement
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import MANIFEST_FILE, Manifest
from vpstore.storage import atomic
from vpstore.storage.locks import Locks
from vpstore.storage.stamps import Stat
from vpstore.workspace import Workspace

ATTESTATIONS_SUFFIX: Final = ".intoto.jsonl"
LOCK: Final = ".views"  # held by the one who makes or replaces a view of this profile
_NO_LINKS: Final = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # what file systems without symbolic links say


def view_path(work: Workspace, manifest: Manifest) -> Path:
    """Where the view of an artifact lies."""
    return work.checkout.views / f"{manifest.ref}-{manifest.digest.short}"


def materialize(work: Workspace, manifest: Manifest) -> Path:
    """Make the view, or find that it is there and unchanged.

    Returns: its path, absolute.
    Raises:  BlobMissing: the artifact was collected meanwhile; VpstoreError: the disk refuses.
    """
    view = view_path(work, manifest)
    with work.changing(), atomic.disk_errors(view, "making a view"):
        _register(work, manifest, view)
        with work.checkout.opened(view.parent) as place:
            _settle(work, manifest, place / view.name)
    return view


def _settle(work: Workspace, manifest: Manifest, view: Path) -> None:
    """Let a view and the list beside it be as they should.

    Args:    view: in its folder held open, as all paths below.
    """
    beside = view.with_name(view.name + ATTESTATIONS_SUFFIX)
    if not _faults(work, manifest, view) and _attested(work, manifest, beside) is None:
        return
    # In the checkout, not in the store: views are the checkout's, and who makes one may only read the store.
    # Without locks, the second of two who replace it is told that something is in the way.
    with Locks(view.parent).exclusive(LOCK, is_needed=False):
        if _faults(work, manifest, view):  # else another process has mended it meanwhile
            _replace(work, manifest, view)
        lines = _attested(work, manifest, beside)  # by now
        if lines is not None:
            _write_attestations(work, manifest, beside, lines)


def _attested(work: Workspace, manifest: Manifest, path: Path) -> bytes | None:
    """What the list beside a view should say, one line an attestation; None if it says so.

    A list of a store that has them no more stays as it is: it may be the last copy.
    """
    lines = b"".join(statement.encode() + b"\n" for statement in work.store.attestations.of(manifest.digest))
    if not os.path.lexists(path) or not _tells_of(path, manifest.digest):
        return lines
    return lines if lines and path.read_bytes() != lines else None


def _write_attestations(work: Workspace, manifest: Manifest, path: Path, lines: bytes) -> None:
    """Write the list; what is there and is no list of the artifact's attestations is kept aside."""
    if os.path.lexists(path) and not _tells_of(path, manifest.digest):
        aside = _aside(path)
        atomic.rename(path, aside)
        shown, kept = (work.checkout.relative(work.checkout.views / name.name) for name in (path, aside))
        work.narrator.warn(f"{shown} was no list of attestations; kept as {kept}")
    atomic.write_if_different(path, lines)


def _tells_of(path: Path, artifact: Digest) -> bool:
    """Whether a file holds nothing but attestations of an artifact, be they another store's, or an earlier one's."""
    if not stat.S_ISREG(path.lstat().st_mode):
        return False
    try:
        told = [Statement.decode(line, where=path.name) for line in path.read_bytes().splitlines()]
    except VpstoreError:
        return False
    return all(statement.artifact == artifact for statement in told)


def _register(work: Workspace, manifest: Manifest, view: Path) -> None:
    """Let the store know who shows the artifact, before anything relies on it."""
    held = {view_name(work.checkout.profile, view.name): manifest.digest}
    if work.is_held(held):
        return
    try:
        work.hold(held)
    except (OSError, VpstoreError):
        if work.store.roots.is_writable and work.store.locks.are_had:
            raise
        why = "nothing can be locked in the store" if work.store.roots.is_writable else "this user cannot write to it"
        work.narrator.warn(f"{manifest.ref}: the store's `vpstore gc` will not know of this view: {why}")


def view_faults(work: Workspace, manifest: Manifest, *, full: bool = False) -> list[str]:
    """The paths in a view that are missing, foreign or not the artifact's, sorted; all of them if there is no view.

    Args:    full: read files that are not links, whatever the stamps say.
    Returns: only "", for the view itself, if something else than a folder lies there; a link is not followed.
    """
    return _faults(work, manifest, view_path(work, manifest), full=full)


def _faults(work: Workspace, manifest: Manifest, view: Path, *, full: bool = False) -> list[str]:
    expected = _expected(manifest)
    if _is_no_folder(view):
        return [""]
    present = set(_files_below(view))
    faults = [path for path in expected if path not in present]
    faults += [path for path in present if path not in expected]
    texts = _LinkTexts(work)
    for path in present & expected.keys():
        if not _shows(work, view / path, expected[path], texts, full=full):
            faults.append(path)
    return sorted(faults)


def _expected(manifest: Manifest) -> dict[str, Digest]:
    return {MANIFEST_FILE: manifest.digest, **{row.path: row.digest for row in manifest.files}}


def _is_no_folder(view: Path) -> bool:
    """Whether something lies at the path that is no folder: a file, a pipe, a link to wherever."""
    return os.path.lexists(view) and not stat.S_ISDIR(view.lstat().st_mode)


def _files_below(view: Path) -> list[str]:
    """Everything in a folder that is no folder, and those folders that cannot be looked into; no link is followed."""
    found: list[Path] = []

    def shut(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            found.append(Path(error.filename))

    for folder, folders, files in os.walk(view, onerror=shut):
        linked = [name for name in folders if (Path(folder) / name).is_symlink()]
        found += [Path(folder) / name for name in (*files, *linked)]
    return [path.relative_to(view).as_posix() for path in found]


def _shows(work: Workspace, path: Path, digest: Digest, texts: _LinkTexts, *, full: bool) -> bool:
    """Whether one entry is the blob: a link to it, or a file with its bytes."""
    if path.is_symlink():
        return os.readlink(path) == texts.of(path, digest)
    if not stat.S_ISREG(path.lstat().st_mode):  # a pipe would be waited for
        return False
    stamps = work.store.blobs.stamps
    if not full and stamps.holds(path, digest):
        return True
    before = Stat.of(path)
    if atomic.digest_file(path)[0] != digest:
        return False
    if Stat.of(path) == before:
        stamps.record([(before, digest)])
    return True


class _LinkTexts:
    """What the links of one view say: relative where store and view move together with the checkout, else absolute.

    Where folders really lie is asked once; a view may have thousands of files.
    """

    def __init__(self, work: Workspace) -> None:
        self._blobs, self._root = work.store.blobs, str(work.store.root)
        root, self._real = os.path.realpath(work.checkout.root) + os.sep, os.path.realpath(work.store.root)
        self._is_inside = os.path.realpath(work.checkout.views).startswith(root) and self._real.startswith(root)
        self._ways: dict[Path, str] = {}  # from a folder of the view to the store

    def of(self, path: Path, digest: Digest) -> str:
        """The text of the link at `path`."""
        blob = str(self._blobs.path(digest))
        if not self._is_inside:
            return blob
        if path.parent not in self._ways:
            self._ways[path.parent] = os.path.relpath(self._real, os.path.realpath(path.parent))
        return self._ways[path.parent] + blob[len(self._root) :]


def _replace(work: Workspace, manifest: Manifest, view: Path) -> None:
    """Build a whole view under a temporary name beside the old one, then swap."""
    for path, digest in sorted(_expected(manifest).items()):
        work.store.blobs.open(digest, what=f"{manifest.ref}, {path}").close()  # nobody may have kept gc away till now
    fresh = atomic.temporary_name(view.parent)
    fresh = fresh.with_name(f".{fresh.name}")
    try:
        texts = _LinkTexts(work)
        for path, digest in sorted(_expected(manifest).items()):
            atomic.make_directory((fresh / path).parent)
            _show(work, fresh / path, digest, texts)
        atomic.fsync_directory(fresh)
        if os.path.lexists(view):
            _set_aside(work, manifest, view)
        atomic.rename(fresh, view)
    finally:
        atomic.remove_tree(fresh)


def _show(work: Workspace, path: Path, digest: Digest, texts: _LinkTexts) -> None:
    blob = work.store.blobs.path(digest)
    if atomic.clone(blob, path):
        atomic.fsync_file(path)
        return
    try:
        atomic.link(path, texts.of(path, digest))
    except OSError as error:
        if error.errno not in _NO_LINKS:  # a disk that is full or broken takes no copy either
            raise
        atomic.copy(blob, path)


def _set_aside(work: Workspace, manifest: Manifest, view: Path) -> None:
    """Keep what a person may have put into a view or in its place; drop what only lacks files or has broken links."""
    expected, aside = _expected(manifest), _aside(view)
    present = [path for path in _faults(work, manifest, view) if os.path.lexists(view / path)]  # as it is by now
    somebodys = [path for path in present if not _is_own_link(work, view / path, expected.get(path))]
    atomic.rename(view, aside)
    if not somebodys:
        atomic.remove_tree(aside)
        return
    shown, kept = (work.checkout.relative(work.checkout.views / path.name) for path in (view, aside))
    kept = f"is kept as {kept}"
    if somebodys == [""]:
        work.narrator.warn(f"{shown} was no view, and what lay there {kept}")
    else:
        work.narrator.warn(f"a view was changed and {kept}: {', '.join(somebodys[:5])}")


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.changed-{atomic.temporary_name(path.parent).name}")


def _is_own_link(work: Workspace, path: Path, digest: Digest | None) -> bool:
    """Whether an entry is a link as vpstore makes them: at a path of the artifact, to a blob of this store.

    A link to the artifact's own blob in another store is one, too: the store was moved.
    """
    if digest is None or not path.is_symlink():
        return False
    text = os.readlink(path)
    named = linked_blob(text)
    if named is None:
        return False
    return named == digest or os.path.realpath(path.parent / text) == os.path.realpath(work.store.blobs.path(named))
