"""Whom a file is for: the mode of a blob, the umask, and the words for a person who was refused a file.

Place in the path: under `atomic` and the blobs; gives a file that a recipe made the mode of those that the store makes.
Invariants: the umask is read without being changed, so that no file that another thread makes meanwhile gets another
mode.

Example:
    become_blob(path, blobs.root) or blobs.put_copy(path)
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Final

from vpstore.storage import system

READ_ONLY: Final = 0o444


def umask(folder: Path) -> int:
    """The permissions that this process gives to nobody.

    Args:    folder: where a file may be made for a moment, if the system does not say it otherwise.
    """
    return _said_by_the_kernel() if os.path.exists("/proc/self/status") else _seen_at_a_new_file(folder)


def _said_by_the_kernel() -> int:
    with open("/proc/self/status", "rb") as status:
        return next(int(line.split()[1], 8) for line in status if line.startswith(b"Umask:"))


def _seen_at_a_new_file(folder: Path) -> int:
    """os.umask tells the umask only by setting another one, for every thread."""
    probe = folder / f"{os.getpid()}-{os.urandom(8).hex()}"
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o777)
    try:
        return 0o777 & ~os.fstat(descriptor).st_mode
    finally:
        os.close(descriptor)
        system.disk.unlink(probe)


def become_blob(path: Path, root: Path) -> bool:
    """Let everybody read a file whom the umask lets, whatever mode its maker gave it, and nobody write it.

    Args:    root: of the blobs, whose group all of them have where folders give theirs.
    Returns: False if only a copy can be a blob: another user left it in an interrupted build, and only the owner may
             change a mode; or it was made outside the store's folders and has not their group.
    """
    folder = root.stat()
    if folder.st_mode & stat.S_ISGID and path.stat().st_gid != folder.st_gid:
        return False
    try:
        system.disk.chmod(path, READ_ONLY & ~umask(path.parent))
    except PermissionError:
        return False
    return True


def can_use(folder: Path) -> bool:
    """Whether this user can read every file below a folder, and make others beside them."""
    return os.access(folder, os.R_OK | os.W_OK | os.X_OK) and all(  # of one that cannot be listed, walk says nothing
        os.access(inner, os.R_OK | os.W_OK | os.X_OK)
        and all(os.access(path, os.R_OK) for name in (*folders, *files) if not (path := Path(inner, name)).is_symlink())
        for inner, folders, files in os.walk(folder)
    )


def obstacle(path: Path) -> Path | None:
    """The folder that keeps this user from removing a path with all that is in it; None if none does.

    One that belongs to this user does not: `atomic.remove_tree` opens it.
    """
    inside = () if path.is_symlink() else os.walk(path)
    folders = (Path(inner, name) for inner, names, _ in inside for name in names)
    return next((folder for folder in chain((path.parent, path), folders) if _keeps(folder)), None)


def _keeps(folder: Path) -> bool:
    if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid == os.geteuid():
        return False
    try:
        return bool(os.listdir(folder)) and not os.access(folder, os.W_OK | os.X_OK)
    except PermissionError:
        return True


def whose(path: Path) -> str:
    """Whose a path is that this user was refused: it, or the folder above it that hides it; "" if nobody knows."""
    for place in (path, *path.parents):
        try:
            found = os.lstat(place)
        except OSError:
            continue
        kind = "the folder" if stat.S_ISDIR(found.st_mode) else "the file"
        subject = f"{kind} {place}" if place != path else kind
        owner = f"{owner_name(found.st_uid)}, group {_name(_group, found.st_gid)}, mode {found.st_mode & 0o7777:04o}"
        return f"{subject} belongs to {owner}; this is {owner_name(os.geteuid())}"
    return ""


def owner_name(user: int) -> str:
    """The name of a user, or the number of one who has no name here."""
    return _name(_user, user)


def _name(find: Callable[[int], str], number: int) -> str:
    try:
        return find(number)
    except KeyError:  # as in a container, or of somebody who has left
        return str(number)


def _user(number: int) -> str:
    return pwd.getpwuid(number).pw_name


def _group(number: int) -> str:
    return grp.getgrgid(number).gr_name
