"""Files that no other process and no later run will look for: the tree and the links that one run of a recipe needs.

Place in the path: under rebuilding. Such a folder is wiped before it is used, so nothing in it has to be durable or
atomic, which would cost two syncs a file.
Invariants: nothing is replaced; every changing call is one of `system`.

Example:
    passing.write(tree / "recipes" / "heal.py", data)
"""

from __future__ import annotations

from pathlib import Path

from vpstore.storage import system


def write(target: Path, data: bytes) -> None:
    """A file, with the folders that it lies in."""
    folders(target.parent)
    left = memoryview(data)
    with target.open("xb", buffering=0) as file:
        while left:
            left = left[system.disk.write(file.fileno(), left) :]


def link(target: Path, place: Path) -> Path:
    """A symbolic link to a place, with the folders that it lies in.

    Returns: the link.
    """
    folders(target.parent)
    system.disk.symlink(str(place), target)
    return target


def folders(path: Path) -> None:
    """A folder, and those that it lies in."""
    if not path.is_dir():
        folders(path.parent)
        system.disk.mkdir(path)
