"""import: take a donor from a folder the person names instead of where its provenance says it lies.

Place in the path: before a build; only the places of the source files change, never what they must be.
Invariants: the SHA-256 of each file stays the pinned one, so the key and the artifact are the same as from the usual
place.

Example:
    prepared = relocate(prepared, Path("~/Downloads/Qwen3-0.6B"))
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vpstore.errors import UsageError
from vpstore.runner import Prepared, PreparedSource


def relocate(prepared: Prepared, folder: Path) -> Prepared:
    """The same preparation with its sources below `folder`.

    Args:    folder: holds the files by their path in the role, `model.safetensors` for `donor/model.safetensors`, or in
             a folder named by the role.
    Raises:  UsageError: no folder, or the stage has no sources.
    """
    if not folder.is_dir():
        raise UsageError("there is no such folder", where=str(folder))
    if not prepared.sources:
        raise UsageError(
            "this object takes nothing from outside",
            where=prepared.recipe_entry,
            expected="a stage with `sources` in objects.toml",
            next_step="vpstore build makes it from its inputs",
        )
    return replace(prepared, sources=tuple(_moved(source, folder) for source in prepared.sources))


def _moved(source: PreparedSource, folder: Path) -> PreparedSource:
    role, _, rest = source.role.partition("/")
    name = rest or source.path.name
    by_role = folder / role / name
    return replace(source, path=by_role if by_role.exists() else folder / name)
