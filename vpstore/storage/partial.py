"""Unfinished files that survive their writer, and are taken up by the next one.

Place in the path: under `Blobs.receive` and the directory remote, which give it a name that follows from the digest, so
that a second run finds what the first one left. The file is locked (flock) by whoever works on it.
Invariants: only one process or thread works on a partial file; what an earlier run left is read and digested before
anything is added; a file is handed on only if the digest of all its bytes is the one that was asked for; bytes that
turn out wrong are removed, so that they are never taken up again.

Example:
    complete(folder / digest.hex, Wanted(digest, size, where="..."), chunks, moved=bar.add, place=store_it)
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from blake3 import blake3

from vpstore.errors import DigestMismatch
from vpstore.schema.digest import Digest
from vpstore.storage import atomic, locks, system

PARALLEL: Final = 4 << 20  # from this size on a blob is digested by several threads
STRIDE: Final = 8 << 20  # after so many bytes the disk is told to begin with them, so that the fsync finds little to do
Moved = Callable[[int], None]
Chunks = Callable[[int], Iterator[bytes]]


class Place(Protocol):
    """Where a finished file goes."""

    def is_done(self) -> bool:
        """Whether a whole blob is already there; asked after another writer of the same blob was waited for."""

    def put(self, path: Path) -> None:
        """Take the finished, durable, read-only file away by renaming it."""


@dataclass(frozen=True)
class Wanted:
    """What the bytes must be, and what to say if they are not."""

    digest: Digest
    size_bytes: int | None  # None: not known, the digest alone decides
    where: str
    what: str = "the bytes that came are not the blob's"
    next_step: str = "vpstore verify --remote finds what is damaged there"

    def mismatch(self, found: str) -> DigestMismatch:
        """The error to raise."""
        size = "" if self.size_bytes is None else f", {self.size_bytes} bytes"
        return DigestMismatch(
            self.what, where=self.where, expected=f"{self.digest}{size}", found=found, next_step=self.next_step
        )


class Digesting:
    """The digest of bytes that go by, by several threads if they are many."""

    def __init__(self, size_bytes: int | None) -> None:
        is_large = size_bytes is None or size_bytes >= PARALLEL
        self._state = blake3(max_threads=blake3.AUTO) if is_large else blake3()
        self.size_bytes = 0

    def add(self, data: bytes | memoryview) -> None:
        """Take the next bytes in."""
        self._state.update(data)
        self.size_bytes += len(data)

    @property
    def digest(self) -> Digest:
        """The digest so far."""
        return Digest.from_hex(self._state.hexdigest())


def complete(path: Path, wanted: Wanted, chunks: Chunks, *, moved: Moved, place: Place) -> None:
    """Bring the partial file to the wanted bytes and hand it on.

    Args:    path: the partial file, there or not, on the file system where it will stay; chunks: the bytes from an
             offset on; moved: told of bytes that came now, not of those taken up.
    Raises:  DigestMismatch: wrong although all was read from the start; the file is gone. Whatever `chunks` raises;
             what came before stays for the next run.
    """
    while True:  # a second round only after wrong bytes were taken up, and then from nothing
        with _held(path) as (descriptor, has_waited):
            if has_waited and place.is_done():
                atomic.remove(path)
                return
            state = Digesting(wanted.size_bytes)
            is_useful = _take_up(descriptor, path, state, limit=wanted.size_bytes)
            taken_up = state.size_bytes
            if is_useful and _extended(path, wanted, state, chunks, moved=moved):
                _settle(descriptor, path, state.size_bytes)
                place.put(path)
                return
            atomic.remove(path)
        if is_useful and not taken_up:
            raise wanted.mismatch(_found(state, wanted))


def _extended(path: Path, wanted: Wanted, state: Digesting, chunks: Chunks, *, moved: Moved) -> bool:
    """Append what is missing; False as soon as it is known that the bytes are not the wanted ones."""
    limit = wanted.size_bytes
    if limit is None or state.size_bytes < limit:
        told = state.size_bytes
        with _appending(path) as out, _closed_after(chunks(told)) as coming:
            for data in coming:
                state.add(data)
                if limit is not None and state.size_bytes > limit:
                    return False
                _write(out, data)
                if state.size_bytes - told >= STRIDE:
                    system.disk.begin_writing(out, told, state.size_bytes - told)
                    told = state.size_bytes
                moved(len(data))
    return state.digest == wanted.digest


def _found(state: Digesting, wanted: Wanted) -> str:
    if wanted.size_bytes is not None and state.size_bytes > wanted.size_bytes:
        return f"more than {wanted.size_bytes} bytes"
    return f"{state.digest}, {state.size_bytes} bytes"


def _take_up(descriptor: int, path: Path, state: Digesting, *, limit: int | None) -> bool:
    """Digest what is there; False if nothing can be added to it: too long, or another user's."""
    size = os.fstat(descriptor).st_size
    if limit is not None and size > limit:
        return False
    if size != limit and not os.access(path, os.W_OK):
        return False
    buffer = memoryview(bytearray(min(atomic.CHUNK, size)))
    while size and (count := os.readv(descriptor, [buffer])):
        state.add(buffer[:count])
    return True


@contextmanager
def _appending(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _closed_after(coming: Iterator[bytes]) -> Iterator[Iterator[bytes]]:
    """Do not leave a connection to the garbage collector."""
    try:
        yield coming
    finally:
        if close := getattr(coming, "close", None):
            close()


def _write(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[system.disk.write(descriptor, left) :]


def _settle(descriptor: int, path: Path, size_bytes: int) -> None:
    """Make the bytes durable, then take the write permission away."""
    found = os.fstat(descriptor)
    try:
        if found.st_size != size_bytes:  # the disk took bytes that it does not have
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        system.disk.fsync(descriptor)
    except OSError:
        # The kernel may have dropped what it could not write and call the next fsync a success: begin anew then.
        with suppress(OSError):
            atomic.remove(path)
        raise
    with suppress(PermissionError):  # another user began it: only the owner may change its mode
        system.disk.fchmod(descriptor, atomic.READ_ONLY & found.st_mode)


@contextmanager
def _held(path: Path) -> Iterator[tuple[int, bool]]:
    """Open the file, made if need be, and lock it; with it, whether somebody else had it before."""
    has_waited = False
    while True:
        descriptor = _opened(path)
        try:
            if not locks.take(descriptor, fcntl.LOCK_EX):
                has_waited = True
                system.disk.flock(descriptor, fcntl.LOCK_EX)
            if _is_named(descriptor, path):
                yield descriptor, has_waited
                return
            has_waited = True  # it was renamed or removed between opening and locking
        finally:
            locks.release(descriptor)


def _opened(path: Path) -> int:
    flags = os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags | os.O_RDWR, 0o666)  # network file systems want write access for the lock
    except PermissionError:
        return os.open(path, flags | os.O_RDONLY, 0o666)  # finished, or another user's


def _is_named(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    return False
