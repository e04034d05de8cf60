"""What a runner staged, judged before anything of it is stored: what an artifact cannot hold, and what it would hide.

Place in the path: tensors -> **here** -> publish. An artifact is files with names and bytes. A link, a pipe or a socket
has no place in it and is refused by name; the bit that makes a file executable, and a folder without files, are lost,
which is said; so is a path of this machine inside a file, which makes other bytes of the same build elsewhere.
Invariants: nothing is changed; whether a build is refused depends on no order of names.

Example:
    refuse_unfit(staged, scratch, where="vpMoE@smoke"); remarks(staged, scratch, places=[checkout.root])
"""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from vpstore.errors import RecipeRefused
from vpstore.runner import Staged, StagedFile
from vpstore.schema.tensor_table import MAX_HEADER_BYTES

_LOOKED_AT: Final = 16 << 20  # bytes from the beginning of a file in which paths are looked for; of a shard, its header
_SHOWN: Final = 3
_KINDS: Final = (
    (stat.S_ISREG, "a file"),
    (stat.S_ISLNK, "a link"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISDIR, "a folder"),
)


def refuse_unfit(staged: Staged, scratch: Path, *, where: str) -> None:
    """Hold what was made against what an artifact can be.

    A file from outside `scratch`, as a donor's, may be reached through a link: its bytes are copied.

    Args:    scratch: where the recipe worked; where: the ref, for errors.
    Raises:  RecipeRefused: nothing was made; a staged file is missing or no plain file; something beside the staged
             files is no plain file.
    """
    if not staged.files:
        raise RecipeRefused(
            "the recipe made nothing",
            where=where,
            expected="at least one file",
            next_step="let the recipe write its files into the folder that the runner lists",
        )
    found = {file.path: _kind(file.source, scratch) for file in (*staged.files, *staged.intermediates)}
    if (folder := output_folder(staged, scratch)) is not None:
        found |= {path.relative_to(folder).as_posix(): _kind(path, scratch) for path in _below(folder)}
    unfit = {path: kind for path, kind in sorted(found.items()) if kind not in ("a file", "a folder", "missing")}
    if unfit:
        raise RecipeRefused(
            "the recipe made what no artifact can hold",
            where=f"{where}, {next(iter(unfit))}",
            expected="files",
            found=", ".join(f"{path}: {kind}" for path, kind in unfit.items())[:500],
            next_step="let the recipe write a file there, or nothing",
        )
    for file in (*staged.files, *staged.intermediates):
        if found[file.path] != "a file":
            raise RecipeRefused("a staged file is missing", where=f"{where}, {file.path}", found=str(file.source))


def remarks(staged: Staged, scratch: Path, *, places: Sequence[Path]) -> list[str]:
    """What of the result an artifact does not keep, or keeps though it belongs to this machine: a sentence each.

    Args:    places: folders of this machine, for instance of the checkout.
    """
    own = [file for file in staged.files if file.source.is_relative_to(scratch)]
    said = _listed("not kept: that a file may be executed", (file.path for file in own if _is_executable(file.source)))
    if (folder := output_folder(staged, scratch)) is not None:
        empty = (path.relative_to(folder).as_posix() for path in _below(folder) if path.is_dir() and _is_empty(path))
        said += _listed("not kept: a folder without files", empty)
    needle = _needle(places)
    return said + _listed("a path of this machine is in the result", _leaks(own, needle))


def output_folder(staged: Staged, scratch: Path) -> Path | None:
    """The folder whose files are the artifact's, path by path; None if there is none, or it is `scratch` itself."""
    tops = set()
    for file in staged.files:
        if file.source.is_relative_to(scratch):
            inner = file.source.as_posix()
            tops.add(Path(inner[: -len(file.path)]) if inner.endswith("/" + file.path) else scratch)
    top = tops.pop() if len(tops) == 1 else scratch
    return None if top == scratch else top


def _kind(path: Path, scratch: Path) -> str:
    try:
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode) and not path.is_relative_to(scratch):
            mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "missing"
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "a device")


def _below(folder: Path) -> Iterator[Path]:
    """Everything below a folder, links among it, none of them followed."""
    for inner, folders, files in os.walk(folder):
        yield from (Path(inner, name) for name in (*folders, *files))


def _is_executable(path: Path) -> bool:
    return bool(path.stat().st_mode & 0o111)


def _is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


def _needle(places: Iterable[Path]) -> re.Pattern[bytes]:
    """Any of these folders, or what is below it; one directly below `/` is too short a word to look for."""
    known = {os.fsencode(path) for path in places if len(path.parts) > 2}
    return (
        re.compile(b"(?:" + b"|".join(map(re.escape, sorted(known))) + rb")(?![\w.-])")
        if known
        else re.compile(b"(?!)")
    )


def _leaks(files: Iterable[StagedFile], needle: re.Pattern[bytes]) -> Iterator[str]:
    for file in files:
        with file.source.open("rb") as source:
            head = source.read(8)
            size = _LOOKED_AT
            if file.path.endswith(".safetensors") and len(head) == 8:
                size = min(MAX_HEADER_BYTES, struct.unpack("<Q", head)[0])
            if found := needle.search(head + source.read(size)):
                yield f"{file.path}, byte {found.start()}"


def _listed(what: str, names: Iterable[str]) -> list[str]:
    found = sorted(names)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return [f"{what}: {', '.join(found[:_SHOWN])}{more}"] if found else []
