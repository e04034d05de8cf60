"""import: take a donor from a folder the person names instead of where its provenance says it lies, or pin it there.

Place in the path: before a build; only the places of the source files change, never what they must be. `pin` alone says
what they must be.
Invariants: without `pin` the SHA-256 of each file stays the pinned one, so the key and the artifact are the same as
from the usual place.

Example:
    prepared = relocate(prepared, Path("~/Downloads/Qwen3-0.6B"), ref=ref)
"""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import file_digest
from pathlib import Path
from typing import Any, Final

from vpstore.errors import UsageError
from vpstore.runner import Prepared, PreparedSource
from vpstore.schema.ref import StageRef
from vpstore.storage import atomic
from vpstore.workspace import Workspace

_FORMAT: Final = 1
_ABOUT: Final = ("origin", "revision", "license")  # what no file tells; a person fills it in
_PASSED_OVER: Final = (
    ".git",
    ".cache",
    ".gitattributes",
    ".gitignore",
)  # of a download, no part of what was downloaded


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


def pin(work: Workspace, ref: StageRef, folder: Path) -> list[Path]:
    """Write the provenance files of a stage's sources: every file of the folder by its SHA-256 and size.

    A provenance file that is there keeps what it says of origin and license, and the names that it lists; a new one
    lists all regular files below the folder. Nothing else is written.

    Args:    folder: holds the files themselves, or for several roles a folder for each.
    Returns: the files that were written, or would have been the same.
    Raises:  UsageError: no such folder, a stage without sources, no file, or one that cannot be read.
    """
    sources = work.checkout.objects.stage(ref).sources
    if not folder.is_dir() or not sources:
        raise UsageError(
            "there is nothing to pin",
            where=str(ref),
            expected="a folder, and a stage with `sources` in objects.toml",
            found=f"{folder} is no folder" if sources else "a stage without sources",
            next_step=f"vpstore import --pin {ref} FOLDER",
        )
    written = []
    for role, name in sources.items():
        own = folder / role if len(sources) > 1 or (folder / role).is_dir() else folder
        path = work.checkout.root / name
        document = _provenance(work, path, own)
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        with atomic.disk_errors(path, "pinning"), work.checkout.opened(path.parent) as place:
            atomic.write_if_different(place / path.name, text.encode())
        written.append(path)
    return written


def _provenance(work: Workspace, path: Path, folder: Path) -> dict[str, Any]:
    try:
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        names = [row["path"] for row in before["files"]] if before.get("files") else _names(folder)
        files = [_pinned(folder, name) for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            "the files cannot be pinned",
            where=work.checkout.relative(path),
            expected="regular files that can be read, and no provenance file or one of its form",
            found=f"{type(error).__name__}: {error}"[:300],
            next_step="name the folder that holds the files; remove the provenance file to pin others than it lists",
        ) from error
    if not files:
        raise UsageError("there is no file to pin", where=str(folder), next_step="name the folder that holds the files")
    about = {key: before.get(key) or f"unknown: write the {key} here" for key in _ABOUT}
    root = folder.relative_to(work.checkout.root) if folder.is_relative_to(work.checkout.root) else folder
    name = before.get("name") or path.stem
    return {"format": _FORMAT, "name": name, **about, "root": root.as_posix(), "files": files}


def _names(folder: Path) -> list[str]:
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [path.as_posix() for path in paths if path.parts[0] not in _PASSED_OVER]


def _pinned(folder: Path, name: str) -> dict[str, Any]:
    with (folder / name).open("rb") as data:
        digest = file_digest(data, "sha256").hexdigest()
    return {"path": name, "sha256": digest, "size_bytes": (folder / name).stat().st_size}


def _moved(source: PreparedSource, folder: Path) -> PreparedSource:
    role, _, rest = source.role.partition("/")
    name = rest or source.path.name
    by_role = folder / role / name
    return replace(source, path=by_role if by_role.exists() else folder / name)
