"""Access: what of a store this user cannot use, whose it is, and what its owner can do about it.

Place in the path: `doctor` asks it, also where the store cannot even be opened.
Invariants: changes nothing; what only processes at work use, below `work/` and `tmp/`, is their owners' own; the cure
gives a group what the owner has, which is what umask 002 would have given it, and everybody only reading; it names no
part of the store in which nothing is shut.

Example:
    for path in shut_out(root): print(path)
"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Final

_WHOLE: Final = ("format", "blobs", "keys", "attestations", "roots", "locks")
_FOLDERS: Final = ("tmp", "tmp/partial", "work", "quarantine")  # what lies in them is nobody else's business


def is_of_group(root: Path) -> bool:
    """Whether the members of a group write to the store."""
    return bool(root.stat().st_mode & stat.S_IWGRP)


def _is_member(root: Path) -> bool:
    """Whether this user is one of them."""
    return is_of_group(root) and root.stat().st_gid in (os.getegid(), *os.getgroups())


def shut_out(root: Path) -> list[Path]:
    """The files that this user cannot read, the folders that it cannot list, and as a member of the group add to."""
    needed = os.R_OK | os.X_OK | (os.W_OK if _is_member(root) else 0)
    parts = chain(_paths(root), (root / name for name in _FOLDERS if _is_member(root)))
    return [path for path in parts if _is_shut(path, needed)]


def _paths(root: Path) -> Iterator[Path]:
    for top in _WHOLE:
        yield root / top
        for folder, folders, files in os.walk(root / top):
            yield from (Path(folder, name) for name in (*folders, *files))


def _is_shut(path: Path, needed: int) -> bool:
    """Whether something is there and refuses this user; what a process at work has removed meanwhile does not."""
    if not os.path.lexists(path) or path.is_symlink():  # in this order: nothing can be asked below a shut folder
        return False
    return not os.access(path, needed if path.is_dir() else os.R_OK)


def cure(root: Path, shut: Sequence[Path]) -> str:
    """The commands with which the owner of what is shut, or root, lets this user use it."""
    # As the umask of a group's store gives it: of a blob the owner may only read, so the group may only read it, too.
    change = "g+u" if _is_member(root) else "a+rX" if root.stat().st_mode & stat.S_IROTH else "g+rX"
    tops = dict.fromkeys(path.relative_to(root).parts[0] for path in shut)
    whole = [root / top for top in tops if top in _WHOLE]
    alone = [path for path in shut if path.relative_to(root).parts[0] not in _WHOLE]
    commands = ((f"chmod -R {change}", whole), (f"chmod {change}", alone))
    return " && ".join(f"{command} {shlex.join(map(str, paths))}" for command, paths in commands if paths)
