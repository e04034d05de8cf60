"""Rules for the relative paths inside an artifact.

Place in the path: under the manifest. A path of an artifact must mean the same file on every file system and must not
lead out of the directory that shows it.
Invariants: forward slashes, no `..`, no absolute path, no control or invisible character, no device name, NFC; no two
paths that a file system without letter case or with another unicode form would take for one; no file that is also a
folder. The lists of characters and names stand here, not in a Unicode version: what is accepted stays accepted.

Example:
    >>> check_path("reports/metrics.json", where="manifest")
    'reports/metrics.json'
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Final

from vpstore.errors import BadManifest

MAX_PATH_BYTES: Final = 1024
MAX_NAME_BYTES: Final = 255
_FORBIDDEN: Final = re.compile(
    "[\x00-\x1f\x7f-\x9f\ud800-\udfff"  # controls, lone surrogates
    "\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]"  # invisible, or turn text round
)
_DEVICE: Final = re.compile(
    r"(?:con|prn|aux|nul|conin\$|conout\$|com[0-9\xb9\xb2\xb3]|lpt[0-9\xb9\xb2\xb3])(?:\..*)?", re.IGNORECASE
)


def check_path(path: object, *, where: str) -> str:
    """Hold one relative path against the rules.

    Returns: the path, unchanged.
    Raises:  BadManifest: absolute, `..`, `.`, empty part, backslash, drive, a character or name that some system cannot
             have in a path, not NFC, too long.
    """
    fault = _path_fault(path)
    if fault:
        raise BadManifest("a path is not acceptable", where=where, expected=fault, found=repr(path)[:120])
    return str(path)


def _path_fault(path: object) -> str:
    if not isinstance(path, str) or not path:
        return "a relative path"
    if _FORBIDDEN.search(path):
        return "no control or invisible characters and no lone surrogates"
    if any(letter in path for letter in '\\:<>"|?*'):
        return 'forward slashes, no backslash and none of : < > " | ? *'
    if unicodedata.normalize("NFC", path) != path:
        return "unicode normal form C"
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "a relative path without empty parts, '.' or '..'"
    if any(part != part.strip(" ") or part.endswith(".") for part in parts):
        return "parts that neither begin nor end with a space nor end with a dot"
    if any(_DEVICE.fullmatch(part) for part in parts):
        return "no name that some systems keep for devices"
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
        end = folded.find("/")
        while end >= 0:
            folders.setdefault(folded[:end], path)
            end = folded.find("/", end + 1)
    for folded in sorted(seen.keys() & folders.keys()):
        raise BadManifest("a file is also a folder", where=where, found=f"{seen[folded]!r} and {folders[folded]!r}")


def fold(path: str) -> str:
    """The form under which two paths that may collide are equal: letter case and unicode form removed."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFKD", path).casefold())
