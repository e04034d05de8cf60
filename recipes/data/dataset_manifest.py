"""The manifest of a data set: every file by digest, and whether a folder is still what its manifest says.

Place in the path: indexed datasets -> **dataset_manifest** -> whoever trains on them.

Invariants: `files` names every file of the data set but the manifest itself, with SHA-256 and size; a reader that
called `checked_manifest` reads no byte that the manifest does not cover.

Example:
    manifest = checked_manifest(Path("weights/tiny/synth_kd@main-…"), kind="synth_kd")
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from vpstore.errors import RecipeRefused

MANIFEST = "manifest.json"
FOLDERS = ("train", "valid")


def described(path: Path) -> dict[str, Any]:
    """SHA-256 and size of a file."""
    with path.open("rb") as data:
        return {"sha256": file_digest(data, "sha256").hexdigest(), "size_bytes": path.stat().st_size}


def digest_of(value: Any) -> str:
    """SHA-256 of a value as JSON with sorted keys and no blanks."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return sha256(text.encode()).hexdigest()


def checked_manifest(folder: Path, *, kind: str) -> dict[str, Any]:
    """The manifest of a data set, after every file was held against it.

    Args:    kind: what the data set must be: healing_text or synth_kd.
    Raises:  RecipeRefused: no manifest, another kind, a file that is missing, differs or is not listed.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        found, files = manifest["kind"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _off(MANIFEST, "the manifest of a data set", f"{type(error).__name__}: {error}") from error
    if found != kind:
        raise _off(MANIFEST, f"a data set of kind {kind}", str(found))
    for where, expected, instead in _differences(folder, files):
        raise _off(where, expected, instead)
    return manifest


def _differences(folder: Path, files: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for name in sorted(files):
        path = folder / name
        instead = described(path) if path.is_file() else None
        if instead != files[name]:
            yield name, f"{files[name]}", f"{instead}" if instead else "no such file"
    for name in FOLDERS:
        for path in sorted((folder / name).glob("*")):
            if (listed := path.relative_to(folder).as_posix()) not in files:
                yield listed, "only files that the manifest lists", "a file that it does not list"


def _off(where: str, expected: str, found: str) -> RecipeRefused:
    return RecipeRefused(
        "a data set is not what its manifest says",
        where=where,
        expected=expected,
        found=found[:200],
        next_step="vpstore verify it, or build it again",
    )
