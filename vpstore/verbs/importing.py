"""import: take a donor from a folder the person names instead of where its provenance says it lies.

Place in the path: before a build; only the places of the source files change, never what they must be.
Invariants: the SHA-256 of each file stays the pinned one, so the key and the artifact are the same as from the usual
place.

Example:
    prepared = relocate(prepared, Path("~/Downloads/Qwen3-0.6B"), ref=ref)
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vpstore.errors import UsageError
from vpstore.runner import Prepared, PreparedSource
from vpstore.schema.ref import StageRef


def relocate(prepared: Prepared, folder: Path, *, ref: StageRef) -> Prepared:
    """The same preparation with its sources below `folder`.

    Args:    folder: holds the files by their path in the role, `model.safetensors` for `donor/model.safetensors`, or in
             a folder named by the role; ref: whose preparation it is, for messages.
    Raises:  UsageError: no folder, or the stage has no sources.
    """
    if not folder.is_dir():
        raise UsageError(
            "there is no such folder",
            where=str(folder),
            expected="the folder that holds the donor's files",
            next_step=f"vpstore import {ref} FOLDER",
        )
    if not prepared.sources:
        raise UsageError(
            "this object takes nothing from outside",
            where=str(ref),
            expected="a stage with `sources` in objects.toml",
            next_step=f"vpstore build {ref} makes it from its inputs",
        )
    return replace(prepared, sources=tuple(_moved(source, folder) for source in prepared.sources))


def _moved(source: PreparedSource, folder: Path) -> PreparedSource:
    role, _, rest = source.role.partition("/")
    name = rest or source.path.name
    by_role = folder / role / name
    return replace(source, path=by_role if by_role.exists() else folder / name)
