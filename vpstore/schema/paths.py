"""Rules for the relative paths inside an artifact.

Place in the path: under the manifest. A path of an artifact must mean the same file on every file system and must not
lead out of the directory that shows it.
Invariants: forward slashes, no `..`, no absolute path, no control character, NFC; no two paths that a file system
without letter case or with another unicode form would take for one; no file that is also a folder.

Example:
    >>> check_path("reports/metrics.json", where="manifest")
    'reports/metrics.json'
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Final

from vpstore.errors import BadManifest

MAX_PATH_BYTES: Final = 1024
MAX_NAME_BYTES: Final = 255


def check_path(path: object, *, where: str) -> str:
    """Hold one relative path against the rules.

    Returns: the path, unchanged.
    Raises:  BadManifest: absolute, `..`, `.`, empty part, backslash, drive, control character, not NFC, too long.
    """
    fault = _path_fault(path)
    if fault:
        raise BadManifest("a path is not acceptable", where=where, expected=fault, found=repr(path)[:120])
    return str(path)


def _path_fault(path: object) -> str:
    if not isinstance(path, str) or not path:
        return "a relative path"
    if any(ord(letter) < 32 or ord(letter) == 127 or 0xD800 <= ord(letter) < 0xE000 for letter in path):
        return "no control characters and no lone surrogates"
    if "\\" in path or ":" in path:
        return "forward slashes, no backslash and no colon"
    if unicodedata.normalize("NFC", path) != path:
        return "unicode normal form C"
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "a relative path without empty parts, '.' or '..'"
    if any(part != part.strip(" ") or part.endswith(".") for part in parts):
        return "parts that neither begin nor end with a space nor end with a dot"
    if len(path.encode()) > MAX_PATH_BYTES or any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        return f"at most {MAX_PATH_BYTES} bytes in all and {MAX_NAME_BYTES} a part"
    return ""


def check_distinct(paths: Iterable[str], *, where: str) -> None:
    """Refuse paths that some file system would take for one another, and files that are also folders.

    Raises:  BadManifest: naming the pair.
    """
    seen: dict[str, str] = {}
    folders: dict[str, str] = {}
    for path in sorted(paths):
        folded = fold(path)
        if folded in seen:
            raise BadManifest("two paths collide", where=where, found=f"{seen[folded]!r} and {path!r}")
        seen[folded] = path
        parts = path.split("/")
        for end in range(1, len(parts)):
            folders.setdefault(fold("/".join(parts[:end])), path)
    for folded in sorted(seen.keys() & folders.keys()):
        raise BadManifest("a file is also a folder", where=where, found=f"{seen[folded]!r} and {folders[folded]!r}")


def fold(path: str) -> str:
    """The form under which two paths that may collide are equal: letter case and unicode form removed."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFKD", path).casefold())
