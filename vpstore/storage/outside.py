"""Files from outside, held against the SHA-256 that their provenance pins.

Place in the path: a build verifies its sources here before anything is read from them.
Invariants: the size is compared before a byte is read; a good file is stamped, so that a large donor is read once.

Example:
    check_sha256(path, sha256, size_bytes=None, stamps=store.blobs.stamps)
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from vpstore.errors import RecipeRefused
from vpstore.storage import atomic
from vpstore.storage.stamps import Stamps, Stat

_LFS: Final = b"version https://git-lfs.github.com/spec/"
_MAX_POINTER_BYTES: Final = 1024  # by the specification


def check_sha256(path: Path, sha256: str, *, size_bytes: int | None, stamps: Stamps) -> None:
    """Read a file from outside and compare.

    Raises:  RecipeRefused: missing, of another size, or with other bytes.
    """
    try:
        before = Stat.of(path)
    except OSError as error:
        raise _refused("a source file is missing", path, sha256, size_bytes, str(error.strerror)) from None
    if not path.is_file():
        raise _refused("a source is not a file", path, sha256, size_bytes, "a directory or device")
    if _is_lfs_pointer(path, before.size):
        raise RecipeRefused(
            "a Git LFS pointer lies in the place of a source file",
            where=str(path),
            expected=f"sha256 {sha256}",
            found="the pointer that Git LFS keeps of it",
            next_step="git lfs pull, in the repository that the file comes from",
        )
    if size_bytes is not None and before.size != size_bytes:
        raise _refused("a source file has the wrong size", path, sha256, size_bytes, f"{before.size} bytes")
    if stamps.holds(path, f"sha256:{sha256}"):
        return
    found = _sha256(path)
    if found != sha256:
        raise _refused("a source file has other bytes", path, sha256, size_bytes, f"sha256 {found}")
    if Stat.of(path) == before:
        stamps.record([(before, f"sha256:{sha256}")])


def _is_lfs_pointer(path: Path, size_bytes: int) -> bool:
    if size_bytes > _MAX_POINTER_BYTES:
        return False
    with path.open("rb") as source:
        return source.read(len(_LFS)) == _LFS


def _sha256(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb", buffering=0) as source:
        while data := source.read(atomic.CHUNK):
            state.update(data)
    return state.hexdigest()


def _refused(what: str, path: Path, sha256: str, size_bytes: int | None, found: str) -> RecipeRefused:
    size = "" if size_bytes is None else f", {size_bytes} bytes"
    return RecipeRefused(
        what,
        where=str(path),
        expected=f"sha256 {sha256}{size}",
        found=found,
        next_step="put the file that the provenance JSON names there, or `vpstore import OBJECT FOLDER`",
    )
