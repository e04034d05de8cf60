"""Locks between processes: who may build a key, who changes the store, who sweeps it.

Place in the path: under `Store` and `Roots`, in the store's `locks/`; and in a checkout's folder of weights, under who
makes views or changes vpstore.lock. One empty file a lock; the kernel holds it and frees it when the process ends,
however it ends, so that nobody has to judge whether a lock is stale.
Invariants: a lock file is never removed (whoever removed one could split its waiters into two groups); another user's
file serves as well; order, where several are held: a key, then the store, then one of a checkout's (the
agreement; the views or the pointers of a profile), then one artifact or root.

Example:
    with locks.exclusive(key.hex, waiting=say): ...
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vpstore.errors import VpstoreError
from vpstore.storage import atomic, refusals, system

STORE: Final = "store"  # shared by those who add to the store, exclusive for the one who sweeps it
_REFUSED: Final = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT)  # no folder, where none could be made


def _silently() -> None:
    pass


@dataclass(frozen=True)
class Locks:
    """The locks of one store."""

    root: Path

    def path(self, name: str) -> Path:
        """The lock's file, whether or not it is there."""
        return self.root / f"{name}.lock"

    @property
    def are_had(self) -> bool:
        """Whether the file system has locks; where it has none nobody can sweep, and who only reads needs none."""
        descriptor = self._open(STORE)
        if descriptor is None:
            return True  # nobody knows
        try:
            take(descriptor, fcntl.LOCK_SH)
        except OSError as error:
            return error.errno not in refusals.NO_LOCKS
        finally:
            release(descriptor)
        return True

    @contextmanager
    def exclusive(
        self, name: str, *, waiting: Callable[[], None] = _silently, is_needed: bool = True
    ) -> Iterator[None]:
        """Be the only one who holds `name`.

        Args:    waiting: called once if somebody else holds it; is_needed: False for who can do without, on a file
                 system that has no locks.
        Raises:  VpstoreError: there are no locks, or no file can be made for one.
        """
        with self._held(name, fcntl.LOCK_EX, waiting, is_needed=is_needed):
            yield

    @contextmanager
    def shared(self, name: str, *, waiting: Callable[[], None] = _silently) -> Iterator[None]:
        """Hold `name` with others who share it, while nobody holds it exclusively. May be held twice by one process."""
        with self._held(name, fcntl.LOCK_SH, waiting, is_needed=False):
            yield

    @contextmanager
    def attempt(self, name: str) -> Iterator[bool]:
        """Hold `name` exclusively if nobody has it.

        Returns: whether it is held; never, on a file system without locks.
        """
        descriptor = self._open(name)
        if descriptor is None:
            yield False
            return
        try:
            yield is_taken(descriptor, fcntl.LOCK_EX)
        finally:
            release(descriptor)

    @contextmanager
    def _held(self, name: str, kind: int, waiting: Callable[[], None], *, is_needed: bool) -> Iterator[None]:
        descriptor = self._open(name)
        if descriptor is None:
            if kind == fcntl.LOCK_EX:
                raise _unwritable(self.root)
            yield  # a store that this user can only read and in which nobody ever locked this: nothing to wait for
            return
        try:
            if not take(descriptor, kind):
                waiting()
                system.disk.flock(descriptor, kind)
        except BaseException as error:
            release(descriptor)
            if not isinstance(error, OSError):
                raise
            # Where nobody can lock, nobody sweeps: who only shares has nothing to wait for.
            if error.errno not in refusals.NO_LOCKS or is_needed:
                raise refusals.as_error(error, self.path(name), "locking") or error from error
            yield
            return
        try:
            yield
        finally:
            release(descriptor)

    def _open(self, name: str) -> int | None:
        """The lock's file, made if need be; None if there is none and this user cannot make it."""
        path = self.path(name)
        with atomic.disk_errors(path, "locking"):
            try:
                # Network file systems want write access for an exclusive lock.
                return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
            try:
                # Of another user, or in a store that is read only.
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                return None


def _unwritable(folder: Path) -> VpstoreError:
    return VpstoreError(
        "a lock cannot be made",
        where=str(folder),
        found="no write access",
        next_step="give this user access to the path",
    )


def take(descriptor: int, kind: int) -> bool:
    """Lock an open file without waiting.

    Returns: whether it could be had.
    Raises:  OSError: the file system has no locks.
    """
    try:
        system.disk.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_taken(descriptor: int, kind: int) -> bool:
    """As `take`; False also where the file system has no locks, and nobody can know whether somebody is at work."""
    try:
        return take(descriptor, kind)
    except OSError as error:
        if error.errno not in refusals.NO_LOCKS:
            raise
        return False


def release(descriptor: int) -> None:
    """Unlock and close: a child that was forked meanwhile has the descriptor, too, and must not keep the lock."""
    with suppress(OSError):  # there is none, or the kernel frees it with the last descriptor
        system.disk.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
