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
import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final

from blake3 import blake3

from vpstore.schema.digest import Digest
from vpstore.storage import hashing, system
from vpstore.storage.modes import READ_ONLY as READ_ONLY
from vpstore.storage.refusals import disk_errors as disk_errors

CHUNK: Final = 1 << 20  # stays in a core's cache while it is read, hashed and written
_NO_SECOND_NAMES: Final = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)  # of file systems without links
_FICLONE: Final = 0x40049409


def fsync_directory(path: Path, *, within: int | None = None) -> None:
    """Make the names in a directory durable, where the file system has a way to.

    Args:    within: the descriptor of a folder that `path` is relative to.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY, dir_fd=within)
    try:
        system.disk.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make the bytes of a file durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        system.disk.fsync(descriptor)
    finally:
        os.close(descriptor)


def begin_writing(path: Path) -> None:
    """Let the disk begin with the bytes of a file that is going to be made durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        system.disk.begin_writing(descriptor, 0, 0)
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


def fsync_up(folder: Path, top: Path) -> None:
    """Make durable every name from `top` down to what is in `folder`.

    For what was found rather than written: whoever made it may have died between the name and its fsync.
    """
    fsync_directory(folder)
    while folder != top:
        folder = folder.parent
        fsync_directory(folder)


def rename(source: Path, target: Path) -> None:
    """Give a durable file its final name, replacing what was there, and make the name durable."""
    system.disk.rename(source, target)
    fsync_directory(target.parent)


def keep_aside(damaged: Path, aside: Path) -> None:
    """Give a damaged file a second name before another file takes its first, so that no name is ever missing.

    Of another user's file the kernel may refuse a second name: then its bytes are copied. What is no file, as a folder,
    cannot have two names, and nobody ever read it: it is moved.
    """
    if not stat.S_ISREG(os.lstat(damaged).st_mode):
        system.disk.rename(damaged, aside)
        fsync_directory(aside.parent)
        fsync_directory(damaged.parent)
        return
    try:
        system.disk.link(damaged, aside)
    except PermissionError:
        copy(damaged, aside)
    fsync_directory(aside.parent)


def remove(path: Path) -> None:
    """Remove a file if it is there."""
    with suppress(FileNotFoundError):
        system.disk.unlink(path)


def remove_if_empty(folder: Path) -> bool:
    """Remove a folder in which nothing is left; whether it is gone."""
    try:
        system.disk.rmdir(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.ENOTDIR):
            raise
        return False
    return True


def remove_tree(path: Path) -> None:
    """Remove a directory and everything in it if it is there; links are removed, never followed.

    A folder that this user shut, as a recipe that makes its files read-only does, is opened to this user first.
    """
    if path.is_symlink() or not path.is_dir():
        remove(path)
        return
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK) and path.stat().st_uid == os.geteuid():
        system.disk.chmod(path, 0o700)
    for inner in sorted(path.iterdir()):
        remove_tree(inner)
    system.disk.rmdir(path)


def entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted; nothing if there is no such folder.

    Not `Path.glob`, which takes a folder that may not be read for an empty one: what is kept would hang on that.

    Raises:  OSError: it cannot be read.
    """
    try:
        return [folder / name for name in sorted(os.listdir(folder))]
    except FileNotFoundError:
        return []


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
        with suppress(OSError):  # so that gc knows it for somebody's, also on another host; not every disk can
            system.disk.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)

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
        """Make the bytes durable; the name is still the temporary one."""
        found = os.fstat(self._file.fileno())
        if found.st_size != self.size_bytes:  # the disk took bytes that it does not have
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self.path))
        # The file was made under the umask: what that took from the group and the world stays taken.
        system.disk.fchmod(self._file.fileno(), mode & found.st_mode)
        system.disk.fsync(self._file.fileno())

    def commit(self, target: Path, *, mode: int = READ_ONLY) -> None:
        """Give the file its final name."""
        self.settle(mode=mode)
        rename(self.path, target)

    def lease(self) -> int:
        """A descriptor that keeps the file locked, under whatever name, for as long as it is open."""
        return os.dup(self._file.fileno())

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


def write_once(target: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write a small file that several may make at once: the first one's bytes stay."""
    make_directory(target.parent)
    with TemporaryFile(target.parent) as out:
        out.write(data)
        out.settle(mode=mode)
        try:
            system.disk.link(out.path, target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, *_NO_SECOND_NAMES):
                raise
            if not os.path.lexists(target):
                system.disk.rename(out.path, target)
        fsync_directory(target.parent)


def digest_file(path: Path) -> tuple[Digest, int]:
    """The digest and size of a file, in constant memory; `hashing.digest_many` does many at once."""
    return hashing.digest_file(path)


def make_writable(path: Path) -> None:
    """Give the owner the write permission; everybody else has what they had."""
    system.disk.chmod(path, path.stat().st_mode & 0o777 | 0o200)


def clone(source: Path, target: Path) -> bool:
    """Create `target` sharing the bytes of `source` (a reflink).

    Returns: False, with nothing left behind, where the file system cannot.
    """
    with source.open("rb") as original, target.open("xb") as copy:
        try:
            fcntl.ioctl(copy.fileno(), _FICLONE, original.fileno())
        except OSError:
            cloned = False
        else:
            system.disk.fchmod(copy.fileno(), READ_ONLY & os.fstat(copy.fileno()).st_mode)
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
