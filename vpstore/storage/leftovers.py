"""Leftovers: what lies in a store beside blobs, keys and attestations, how old it is, and whether somebody has it.

Place in the path: `gc` removes what is old and nobody's, `doctor` says how much there is. Temporary files, unfinished
downloads and scratch folders outlive their writers only by a kill; quarantine keeps damaged blobs until a person asks.
Invariants: age is by ctime, which no program can set back, and of a folder that of the youngest thing in it that this
user can see; what cannot be looked at is young; what this user cannot remove is told, and left whole; a scratch folder
whose key is locked and a file that is locked are somebody's.

Example:
    for leftover in leftovers(store): print(leftover.kind, leftover.path, leftover.size_bytes)
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vpstore.schema.digest import is_hex
from vpstore.storage import modes
from vpstore.storage.locks import is_taken, release
from vpstore.storage.store import Store

Kind = Literal["temporary", "download", "scratch", "process", "quarantine"]


@dataclass(frozen=True)
class Clock:
    """Says what is young: changed less than the grace period ago. A grace period of zero knows no youth."""

    now: float  # Unix time
    grace_seconds: float

    def is_young(self, path: Path) -> bool:
        """Whether a file, or anything in a folder, changed within the grace period."""
        if self.grace_seconds <= 0:
            return False
        try:
            return self.now - changed(path) < self.grace_seconds
        except FileNotFoundError:
            return False
        except OSError:
            return True


@dataclass(frozen=True)
class Leftover:
    """One file or folder that is no part of an artifact."""

    kind: Kind
    path: Path
    size_bytes: int


def leftovers(store: Store) -> Iterator[Leftover]:
    """Everything of the kind, whoever it belongs to, in a fixed order."""
    partial = store.root / "tmp" / "partial"
    for path in _listed(store.root / "tmp"):
        if path != partial:
            yield Leftover("temporary", path, size(path))
    for path in _listed(partial):
        yield Leftover("download", path, size(path))
    for path in _listed(store.root / "work"):
        yield Leftover("scratch", path, size(path))
    for path in store.roots.abandoned():
        yield Leftover("process", path, size(path))
    for path in _listed(store.root / "quarantine"):
        yield Leftover("quarantine", path, size(path))


def obstacle(store: Store, leftover: Leftover) -> Path | None:
    """What keeps this user from removing a leftover, or from asking whether somebody has it; None if nothing does."""
    path = leftover.path
    asked = store.locks.path(path.name) if _is_keyed(leftover) else path
    if asked.is_file() and not asked.is_symlink() and not os.access(asked, os.R_OK):
        return asked
    return modes.obstacle(path)


@contextmanager
def unused(store: Store, leftover: Leftover) -> Iterator[bool]:
    """Keep others from taking up a scratch folder or a download.

    Returns: whether nobody was at it.
    """
    if _is_keyed(leftover):
        with store.locks.attempt(leftover.path.name) as is_ours:
            yield is_ours
    elif leftover.kind == "temporary" and _is_alive(leftover.path.name.partition("-")[0]):
        yield False  # also in the moment before it has locked its file
    elif leftover.path.is_file() and not leftover.path.is_symlink():
        descriptor = os.open(leftover.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            yield is_taken(descriptor, fcntl.LOCK_SH)  # whoever writes it has it locked, also on another host
        finally:
            release(descriptor)
    else:
        yield True


def _is_keyed(leftover: Leftover) -> bool:
    """Whether it is the scratch folder of a key, as one that was set aside is not any more."""
    return leftover.kind == "scratch" and is_hex(leftover.path.name, 64)


def _is_alive(pid: str) -> bool:
    if not pid.isdecimal() or len(pid) > 9:
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def changed(path: Path) -> float:
    """When a file, or the youngest thing in a folder, last changed: its ctime as a Unix time.

    Not its mtime, which a recipe may have set, and which renaming into the store leaves as it was.
    """
    latest = os.lstat(path).st_ctime
    with suppress(PermissionError):  # shut to this user, who cannot remove it either
        for inner in _inside(path):
            latest = max(latest, changed(inner))
    return latest


def size(path: Path) -> int:
    """Bytes of a file, or of the files in a folder, as far as they can be seen; links are not followed."""
    try:
        is_folder = path.is_dir() and not path.is_symlink()
        return sum(map(size, _inside(path))) if is_folder else os.lstat(path).st_size
    except OSError:
        return 0


def _listed(folder: Path) -> list[Path]:
    """What is in a folder of the store; of one that this user may not list, the folder itself, which stays."""
    try:
        return _inside(folder)
    except PermissionError:
        return [folder]


def _inside(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []
