"""A directory as a remote: a mounted share, a second disk, another machine's export.

Place in the path: `dvc.open_remote` opens it for DVC's local remotes. The directory is laid out like any other remote;
what is on its way lies in `vpstore/tmp/` of the same directory, so that the last step is one rename.
Invariants: every write goes through `atomic`; a blob is digested while it is copied and gets its name only if the
digest is right; an upload that was killed is taken up where it stood, after what lies there was digested; a replacement
takes the place of what was there in one step.

Example:
    remote = DirectoryRemote(Path("/mnt/models"), "shelf (/mnt/models)")
    remote.upload(blob_name(digest), path, digest, moved=bar.add)
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from vpstore.errors import RemoteFailure
from vpstore.schema.digest import Digest
from vpstore.storage import atomic
from vpstore.storage.partial import PARALLEL, Wanted, complete
from vpstore.storage.remotes.base import FOLDER, Moved
from vpstore.storage.remotes.failures import check_name
from vpstore.storage.remotes.local import absent, local_chunks, local_mismatch, local_size, oversized

_ADVICE: Final = {
    errno.ENOSPC: "free space on the remote's file system, then run the command again: what went over is kept",
    errno.EDQUOT: "raise the quota on the remote, then run the command again: what went over is kept",
    errno.EACCES: "give this user access to the directory",
    errno.EPERM: "give this user access to the directory",
    errno.EROFS: "mount the remote's file system writable",
}


class DirectoryRemote:
    """One directory, as a remote."""

    lists = True

    def __init__(self, root: Path, label: str, *, folder: str = FOLDER) -> None:
        """Open it.

        Args:    folder: where below `root` the objects lie; "." if `root` is a store.
        """
        self.label = label
        self._root = root / folder
        self._tmp = self._root / "tmp"
        self._can_clone = True  # until the file system says otherwise
        self._settled: set[Path] = set()  # folders whose names are durable

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Every object below a folder, in the order of names; links and other odd things are not objects."""
        with self._failures(prefix):
            yield from self._below(self._path(prefix))

    def size(self, name: str) -> int | None:
        """The size of one object, or None."""
        with self._failures(name):
            path = self._path(name)
            if not _is_object(path):
                return None
            self._settle_if_allowed(path.parent)
            return path.stat(follow_symlinks=False).st_size

    def read(self, name: str, *, limit: int) -> bytes:
        """A small object, whole."""
        with self._failures(name), self._open(name) as source:
            data = source.read(limit + 1)
        if len(data) > limit:
            raise oversized(self.label, name, limit)
        return data

    def chunks(self, name: str, *, start: int = 0) -> Iterator[bytes]:
        """The bytes from `start` on."""
        with self._failures(name), self._open(name) as source:
            source.seek(start)
            while data := source.read(atomic.CHUNK):
                yield data

    def write(self, name: str, data: bytes) -> None:
        """Put a small object."""
        with self._failures(name):
            target = self._prepared(name)
            atomic.write_file(target, data, folder=self._tmp)

    def upload(self, name: str, source: Path, digest: Digest, *, moved: Moved) -> None:
        """Put a blob; where the file system shares bytes between files, the shared ones are digested and named."""
        size = local_size(source)
        with self._failures(name):
            slot = _Slot(self._prepared(name), digest)
            begun = self._tmp / f"{digest.hex}.part"
            if size >= PARALLEL and self._can_clone and not begun.exists() and self._cloned(source, slot):
                moved(size)
                return
            wanted = local_mismatch(source, Wanted(digest, size, where=self.label))
            complete(begun, wanted, lambda start: local_chunks(source, start), moved=moved, place=slot)

    def remove(self, name: str) -> None:
        """Remove an object if it is there."""
        with self._failures(name):
            atomic.remove(self._path(name))

    def _cloned(self, source: Path, slot: _Slot) -> bool:
        copy = atomic.temporary_name(self._tmp)
        try:
            self._can_clone = atomic.clone(source, copy)
            if not self._can_clone:
                return False
            found, _ = atomic.digest_file(copy)
            if found != slot.digest:
                return False  # the copying way says what is wrong
            atomic.fsync_file(copy)
            slot.put(copy)
            return True
        finally:
            atomic.remove(copy)

    def _path(self, name: str) -> Path:
        return self._root / check_name(name)

    def _prepared(self, name: str) -> Path:
        target = self._path(name)
        atomic.make_directory(self._tmp)
        atomic.make_directory(target.parent)
        self._settle(target.parent)  # who made the folder may have died before that
        return target

    def _open(self, name: str) -> BinaryIO:
        path = self._path(name)
        if not _is_object(path):
            raise absent(self.label, name)
        return path.open("rb", buffering=0)

    def _below(self, folder: Path) -> Iterator[tuple[str, int]]:
        try:
            found = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        if any(entry.is_file(follow_symlinks=False) for entry in found):
            self._settle_if_allowed(folder)
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                yield from self._below(folder / entry.name)
            elif entry.is_file(follow_symlinks=False):
                name = (folder / entry.name).relative_to(self._root).as_posix()
                yield name, entry.stat(follow_symlinks=False).st_size

    def _settle(self, folder: Path) -> None:
        """Make durable what was found, before anybody relies on it: a push may have been killed before it did so."""
        while folder not in self._settled:
            atomic.fsync_directory(folder)
            self._settled.add(folder)
            if folder == self._root.parent:  # the remote's own folder, which names all else
                break
            folder = folder.parent

    def _settle_if_allowed(self, folder: Path) -> None:
        """The same for reading, where a file system that refuses is no hindrance."""
        with suppress(OSError):
            self._settle(folder)

    @contextmanager
    def _failures(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise absent(self.label, name) from error
        except OSError as error:
            raise RemoteFailure(
                "the remote's directory refuses",
                where=f"{self.label}: {name}",
                found=f"{os.strerror(error.errno or 0)}: {error.filename or self._root}",
                next_step=_ADVICE.get(error.errno or 0, "look at the directory, then run the command again"),
            ) from error


@dataclass(frozen=True)
class _Slot:
    """The place of one blob on the remote."""

    target: Path
    digest: Digest

    def is_done(self) -> bool:
        try:
            return atomic.digest_file(self.target)[0] == self.digest
        except FileNotFoundError:
            return False

    def put(self, path: Path) -> None:
        atomic.rename(path, self.target)


def _is_object(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()
