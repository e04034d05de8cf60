"""What a file system can do of what a store and a checkout ask of it, tried before anything relies on it.

Place in the path: `doctor` asks. Network and user-space file systems (NFS, Lustre, SMB, FUSE) may lack locks, modes, an
fsync or a rename that replaces, and say so only when they are asked.
Invariants: everything is done in a folder of its own, which is removed again, in the calls that the commands make.

Example:
    for fault in try_out(store.root / "tmp"): print(fault)
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from vpstore.errors import VpstoreError
from vpstore.storage import atomic, system
from vpstore.storage.locks import Locks


def try_out(folder: Path) -> list[str]:
    """What does not work in a folder, each with what the system said; empty if all does.

    Not being able to give a file a second name, or a symbolic link, is no fault: copies are made then.
    """
    place = atomic.temporary_name(folder)
    try:
        system.disk.mkdir(place)
    except OSError as error:
        return [f"making a folder: {error.strerror}"]
    try:
        acts: dict[str, Callable[[Path], None]] = {
            "writing": _write, "changing a mode": _change_mode, "making durable": _settle, "renaming": _rename,
            "locking": _lock, "making a folder durable": _settle_folder,
        }  # fmt: skip
        return [f"{what}: {said}" for what, act in acts.items() if (said := _said(act, place))]
    finally:
        with suppress(OSError):
            atomic.remove_tree(place)


def _said(act: Callable[[Path], None], place: Path) -> str:
    try:
        act(place)
    except OSError as error:
        return os.strerror(error.errno or 0)
    except VpstoreError as error:
        return error.what
    return ""


def _write(place: Path) -> None:
    with (place / "file").open("wb", buffering=0) as out:
        system.disk.write(out.fileno(), memoryview(b"x"))
    (place / "other").write_bytes(b"y")


def _change_mode(place: Path) -> None:
    with (place / "file").open("rb") as file:
        system.disk.fchmod(file.fileno(), atomic.READ_ONLY)


def _settle(place: Path) -> None:
    atomic.fsync_file(place / "file")


def _settle_folder(place: Path) -> None:
    atomic.fsync_directory(place)


def _rename(place: Path) -> None:
    system.disk.rename(place / "file", place / "other")


def _lock(place: Path) -> None:
    with Locks(place).exclusive("lock"), (place / "lock.lock").open("rb") as second:
        try:
            system.disk.flock(second.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
    raise VpstoreError("two hold one lock at once", next_step="mount the file system with locks")
