"""Holdings: what a checkout has now, by its pointers, views and lock, under every profile.

Place in the path: `gc` reads every registered checkout through this; whoever makes a pointer, view or lock entry
records it in the store's roots under the names below.
Invariants: reads only, and only at the root that is named, never above it; what cannot be read is said, never taken for
absent; a pointer of another file name, a view that was set aside or whose `artifact.json` is gone still counts.

Example:
    holdings = read_holdings(Path("/home/ada/vpmoe")); holdings.artifacts["tiny/vpMoE@smoke"]
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vpstore.checkout import CheckoutConfig, read_toml
from vpstore.errors import UsageError, VpstoreError
from vpstore.schema.digest import Digest
from vpstore.schema.lockfile import Lockfile
from vpstore.schema.manifest import MANIFEST_FILE
from vpstore.schema.ref import StageRef
from vpstore.storage.pointers import read_pointer

IDENTITY_FILE: Final = ".checkout-id"  # in the folder of weights, of all profiles
_VIEW: Final = re.compile(r"[^.].*@.*-([0-9a-f]{12})(?:\.changed-.*)?")
_BLOB: Final = re.compile(r"(?:.*/)?([0-9a-f]{2})/([0-9a-f]{62})")


def pointer_name(profile: str, ref: StageRef) -> str:
    """What a pointer is called in the roots."""
    return f"{profile}/{ref}"


def view_name(profile: str, folder: str) -> str:
    """What a view is called in the roots."""
    return f"view {profile}/{folder}"


def lock_name(profile: str, ref: StageRef) -> str:
    """What a lock entry is called in the roots."""
    return f"lock {profile}/{ref}"


@dataclass
class Holdings:
    """What was found in one checkout."""

    identity: str = ""
    artifacts: dict[str, Digest] = field(default_factory=dict)  # by the names above
    prefixes: dict[str, str] = field(default_factory=dict)  # views of which only the first 12 digits are known
    troubles: dict[str, str] = field(default_factory=dict)  # what could not be read, by path, and why
    pointers: set[str] = field(default_factory=set)  # those of the troubles that are pointers
    lock_path: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether everything could be read."""
        return not self.troubles


def read_holdings(root: Path) -> Holdings | None:
    """Read the checkout at `root`.

    Returns: None if there is no checkout there: nothing, or a folder without [tool.vpstore] (an empty mount point).
    """
    found = Holdings()
    try:
        file = root / "pyproject.toml"
        if not file.is_file():
            os.stat(root)  # says why, if it cannot be looked into
            return None
        table = read_toml(file).get("tool", {}).get("vpstore")
        if table is None:
            return None
        config = CheckoutConfig.parse(table, where=str(file))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        found.troubles[str(root)] = error.strerror or str(error)
        return found
    except UsageError as error:
        found.troubles[str(root / "pyproject.toml")] = error.what
        return found
    weights = root / config.weights
    for profile in _folders(weights, found):
        _read_pointers(profile, found)
        _read_views(profile, found)
    found.lock_path = str(root / config.lock)
    _read_lock(root / config.lock, found)
    found.identity = read_identity(weights / IDENTITY_FILE)
    return found


def read_identity(path: Path) -> str:
    """What tells a checkout from others at the same path; empty if it has nothing of the kind."""
    try:
        return path.read_text(encoding="ascii").strip()[:64]
    except (OSError, UnicodeDecodeError):
        return ""


def _folders(folder: Path, found: Holdings) -> Iterator[Path]:
    """The folders in a folder; a missing folder has none, unless a link to it leads nowhere."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        yield from (Path(entry.path) for entry in entries if entry.is_dir())
    except FileNotFoundError:
        if folder.is_symlink():
            found.troubles[str(folder)] = "a link that leads nowhere"
    except OSError as error:
        found.troubles[str(folder)] = error.strerror or str(error)


def _read_pointers(profile: Path, found: Holdings) -> None:
    try:
        names = sorted(name for name in os.listdir(profile / "refs") if name.endswith(".json"))
    except FileNotFoundError:
        if (profile / "refs").is_symlink():
            found.troubles[str(profile / "refs")] = "a link that leads nowhere"
        return
    except OSError as error:
        found.troubles[str(profile / "refs")] = error.strerror or str(error)
        return
    for name in names:
        path = profile / "refs" / name
        try:
            pointer = read_pointer(path)
        except (VpstoreError, OSError) as error:
            found.troubles[str(path)] = _reason(error)
            found.pointers.add(str(path))
            continue
        is_own = f"{pointer.ref.slug}.json" == name
        label = pointer_name(profile.name, pointer.ref) if is_own else f"{profile.name}/refs/{name}"
        found.artifacts[label] = pointer.artifact


def _read_views(profile: Path, found: Holdings) -> None:
    for folder in _folders(profile, found):
        match = _VIEW.fullmatch(folder.name)
        artifact = _shown(folder) if match or (folder.name[0] != "." and folder.name != "refs") else None
        name = view_name(profile.name, folder.name)
        if artifact is not None:
            found.artifacts[name] = artifact
        if match and (artifact is None or not artifact.hex.startswith(match[1])):
            found.prefixes[name] = match[1]


def _shown(view: Path) -> Digest | None:
    """The artifact that a view shows, by its manifest: a link to the blob, or a copy; None if neither is there."""
    path = view / MANIFEST_FILE
    try:
        if path.is_symlink():
            return linked_blob(os.readlink(path))
        return Digest.of(path.read_bytes())
    except OSError:
        return None


def linked_blob(text: str) -> Digest | None:
    """The blob that a view's link names by its text, whichever store it leads to; None if it is no such link."""
    match = _BLOB.fullmatch(text)
    return Digest.from_hex(match[1] + match[2]) if match else None


def _read_lock(path: Path, found: Holdings) -> None:
    try:
        lock = Lockfile.decode(path.read_bytes(), where=str(path))
    except FileNotFoundError:
        return
    except (VpstoreError, OSError) as error:
        found.troubles[str(path)] = _reason(error)
        return
    for profile, entries in lock.profiles.items():
        for ref, entry in entries.items():
            found.artifacts[lock_name(profile, ref)] = entry.artifact


def _reason(error: VpstoreError | OSError) -> str:
    return error.what if isinstance(error, VpstoreError) else error.strerror or str(error)
