"""Writes that are whole or absent, whatever happens in between.

Place in the path: under everything that changes a disk. Each file is written under a temporary name, fsynced, given its
mode, renamed to its final name, and its directory fsynced; so a name that exists has its bytes, also after a power cut.
Invariants: every write, fsync, rename, link and unlink of the package is one of the functions below, which go through
`system.disk`, so that faults can be injected in one place; a temporary file never outlives its writer except by a kill;
modes respect the umask, so that a store is as private, or as open to a group, as the people who write to it.

Example:
    with TemporaryFile(store.tmp) as out:
        out.write(b"...")
        out.commit(store.blobs.path(out.digest))
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final

from blake3 import blake3

from vpstore.errors import VpstoreError
from vpstore.schema.digest import Digest
from vpstore.storage import system

READ_ONLY: Final = 0o444
CHUNK: Final = 8 << 20
_PARALLEL: Final = 1 << 20  # below this size, handing the work to threads costs more than it gives
_FICLONE: Final = 0x40049409


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        system.disk.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make the bytes of a file durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        system.disk.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create a directory and its missing parents, durably."""
    if path.is_dir():
        return
    make_directory(path.parent)
    with suppress(FileExistsError):  # another process was faster; if it is no directory, the next step says so
        system.disk.mkdir(path)
    fsync_directory(path.parent)


def rename(source: Path, target: Path) -> None:
    """Give a durable file its final name, replacing what was there, and make the name durable."""
    system.disk.rename(source, target)
    fsync_directory(target.parent)


def keep_aside(damaged: Path, aside: Path) -> None:
    """Give a damaged file a second name before another file takes its first, so that no name is ever missing."""
    system.disk.link(damaged, aside)
    fsync_directory(aside.parent)


def remove(path: Path) -> None:
    """Remove a file if it is there."""
    with suppress(FileNotFoundError):
        system.disk.unlink(path)


def remove_tree(path: Path) -> None:
    """Remove a directory and everything in it if it is there; links are removed, never followed."""
    if path.is_symlink() or not path.is_dir():
        remove(path)
        return
    for inner in sorted(path.iterdir()):
        remove_tree(inner)
    system.disk.rmdir(path)


def temporary_name(folder: Path) -> Path:
    """A name in `folder` that nobody else uses: the process and 64 random bits."""
    return folder / f"{os.getpid()}-{os.urandom(8).hex()}"


class TemporaryFile:
    """A file that digests what is written to it and appears only on `commit`."""

    def __init__(self, folder: Path) -> None:
        self.path = temporary_name(folder)
        self.size_bytes = 0
        self._state = blake3(max_threads=blake3.AUTO)
        self._file = self.path.open("xb", buffering=0)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append bytes; short writes are continued until all are written."""
        left = memoryview(data).cast("B")
        while left:
            left = left[system.disk.write(self._file.fileno(), left) :]
        self._state.update(data)
        self.size_bytes += len(data)
        return len(data)

    @property
    def digest(self) -> Digest:
        """The digest of what was written so far."""
        return Digest.from_hex(self._state.hexdigest())

    def settle(self, *, mode: int = READ_ONLY) -> None:
        """Make the bytes durable and close; the name is still the temporary one."""
        # The file was made under the umask: what that took from the group and the world stays taken.
        os.fchmod(self._file.fileno(), mode & os.fstat(self._file.fileno()).st_mode)
        system.disk.fsync(self._file.fileno())
        self._file.close()

    def commit(self, target: Path, *, mode: int = READ_ONLY) -> None:
        """Give the file its final name."""
        self.settle(mode=mode)
        rename(self.path, target)

    def __enter__(self) -> TemporaryFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close, and remove the temporary name if it was not committed."""
        self._file.close()
        remove(self.path)


def write_file(target: Path, data: bytes, *, folder: Path, mode: int = READ_ONLY) -> None:
    """Write a small file, whole or not at all.

    Args:    folder: where the temporary file goes; on the same file system as `target`.
    """
    with TemporaryFile(folder) as out:
        out.write(data)
        out.commit(target, mode=mode)


def write_if_different(target: Path, data: bytes, *, mode: int = 0o644) -> bool:
    """Write a small file in a working tree unless it already has these bytes.

    Returns: whether it was written. An unchanged file keeps its times, so that nothing downstream looks changed.
    """
    if target.is_file() and not target.is_symlink() and target.read_bytes() == data:
        return False
    make_directory(target.parent)
    with TemporaryFile(target.parent) as out:
        out.write(data)
        out.commit(target, mode=mode)
    return True


def digest_file(path: Path) -> tuple[Digest, int]:
    """The digest and size of a file, in constant memory."""
    state = blake3()
    size = 0
    with path.open("rb", buffering=0) as source:
        length = os.fstat(source.fileno()).st_size
        if length >= _PARALLEL:
            state = blake3(max_threads=blake3.AUTO)
        buffer = memoryview(bytearray(max(1, min(CHUNK, length))))
        while count := source.readinto(buffer):
            state.update(buffer[:count])
            size += count
    return Digest.from_hex(state.hexdigest()), size


def make_read_only(path: Path) -> None:
    """Take the write permission from everybody, and give nobody a permission that was not there."""
    path.chmod(READ_ONLY & path.stat().st_mode)


def clone(source: Path, target: Path) -> bool:
    """Create `target` sharing the bytes of `source` (a reflink).

    Returns: False, with nothing left behind, where the file system cannot.
    """
    import fcntl

    with source.open("rb") as original, target.open("xb") as copy:
        try:
            fcntl.ioctl(copy.fileno(), _FICLONE, original.fileno())
        except OSError:
            cloned = False
        else:
            os.fchmod(copy.fileno(), READ_ONLY & os.fstat(copy.fileno()).st_mode)
            cloned = True
    if not cloned:
        remove(target)
    return cloned


def copy(source: Path, target: Path) -> None:
    """Copy a blob's bytes into a new read-only file, durably."""
    with TemporaryFile(target.parent) as out:
        with source.open("rb", buffering=0) as original:
            while data := original.read(CHUNK):
                out.write(data)
        out.commit(target)


def link(target: Path, text: str) -> None:
    """Create a symbolic link that reads `text`."""
    system.disk.symlink(text, target)


@contextmanager
def disk_errors(where: Path | str, doing: str) -> Iterator[None]:
    """Turn the operating system's refusals into errors that say where and what next.

    Raises:  VpstoreError: no space, no permission, a read-only file system, a quota, an input/output error.
    """
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "free space on this file system, then run the command again: what was finished is kept",
            errno.EDQUOT: "raise the quota, then run the command again: what was finished is kept",
            errno.EACCES: "give this user access to the path",
            errno.EPERM: "give this user access to the path",
            errno.EROFS: "mount the file system writable, or set VPSTORE_ROOT to a writable place",
            errno.EIO: "the device reports damage: move the store to another disk",
        }.get(error.errno or 0)
        if advice is None:
            raise
        raise VpstoreError(
            f"{doing} failed: {os.strerror(error.errno or 0)}",
            where=str(error.filename or where),
            next_step=advice,
        ) from error
