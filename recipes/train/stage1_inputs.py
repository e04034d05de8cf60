"""What a Stage 1 trainer has before it, held against what `stage1.toml` says it must be.

Place in the path: stage1_handoff's files + three directories -> **stage1_inputs** -> stage1_run. Nothing of the store
is needed: an artifact's directory holds its manifest as `artifact.json`, the artifact's digest is the BLAKE3 of that
file, and the manifest names every other file by digest. A trainer on another machine can do the same with a hash
function and a JSON parser.

Invariants: no weight and no token is read before every file of every input was hashed; a difference is refused with
the name of the input, what was expected and what was found.

Example:
    found = open_inputs(Path("stage1"), {"checkpoint": Path("vpMoE"), "data": …, "tokenizer": …})
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from blake3 import blake3

from recipes.checkpoint import parse_student_config
from recipes.data.dataset_manifest import checked_manifest
from recipes.model.config import StudentConfig
from recipes.train.stage1_document import RUN_FILE, parse_document
from recipes.train.stage1_tables import tokenizer_table
from vpstore.errors import RecipeRefused

MANIFEST_OF_ARTIFACT = "artifact.json"
Role = Literal["checkpoint", "data", "tokenizer"]
ROLES: tuple[Role, ...] = ("checkpoint", "data", "tokenizer")


@dataclass(frozen=True)
class Stage1Inputs:
    """The run as it is written, and the verified directories that it names."""

    document: Mapping[str, Any]
    config: StudentConfig
    folders: Mapping[Role, Path]
    digests: Mapping[str, str]  # of checkpoint, data, data_manifest, tokenizer and config


def open_inputs(run: Path, folders: Mapping[Role, Path]) -> Stage1Inputs:
    """Read the run's file and verify all that it names.

    Args:    run: the directory of the artifact `stage1`. folders: the directories of its inputs.
    Raises:  RecipeRefused: an input, a manifest, a tokenizer or a model that is not the run's; damaged files; a run
             that is not complete.
    """
    verify_folder(run, "run")
    data = _read(run / RUN_FILE)
    document = parse_document(data)
    for role in ROLES:
        wanted, found = document["inputs"][role], verify_folder(folders[role], role)
        if found != wanted["digest"]:
            raise _refusal(
                "an input is not the one that the run names", f"{role} {wanted['ref']}", wanted["digest"], found
            )
    digests: dict[str, str] = {role: document["inputs"][role]["digest"] for role in ROLES}
    digests |= {"data_manifest": _data_manifest(folders["data"], document["data"]), "config": _digest(data)}
    _require_tokenizer(document["tokenizer"])
    config = parse_student_config(_json(folders["checkpoint"] / "config.json"))
    if config.model_dump(mode="json") != document["model"]:
        raise _refusal("the checkpoint is another model", "checkpoint", "the [model] of the run", "its config.json")
    return Stage1Inputs(document, config, dict(folders), digests)


def verify_folder(folder: Path, what: str) -> str:
    """Hold every file of an artifact's directory against its manifest.

    Returns: the artifact's digest.
    Raises:  RecipeRefused: no manifest, one that is none, or a file that is missing or differs; the first one is
             named, all are counted.
    """
    manifest = _read(folder / MANIFEST_OF_ARTIFACT)
    faults = list(_faults(folder, _rows(folder / MANIFEST_OF_ARTIFACT, what)))
    if faults:
        name, expected, found = faults[0]
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise _refusal("an input is damaged", f"{what}: {name}", expected, found + more)
    return _digest(manifest)


def _rows(manifest: Path, what: str) -> list[Mapping[str, Any]]:
    """The files that a manifest names; a path that leads out of its folder is refused before anything is opened."""
    rows: list[Mapping[str, Any]] = _json(manifest).get("files")  # type: ignore[assignment]
    kinds = {"path": str, "digest": str, "size_bytes": int}
    is_list = isinstance(rows, list) and all(isinstance(row, Mapping) for row in rows)
    if not is_list or not all(type(row.get(key)) is kind for row in rows for key, kind in kinds.items()):
        expected = "files: a list of path, digest and size_bytes"
        raise _refusal("an input has no manifest", f"{what}: {manifest.name}", expected, repr(rows)[:200])
    for row in rows:
        path = PurePosixPath(row["path"])
        if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in row["path"]:
            expected = "paths inside of its folder"
            raise _refusal("a manifest leads out of its folder", f"{what}: {manifest.name}", expected, row["path"])
    return rows


def _json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        found = f"{type(error).__name__}: {error}"
        raise _refusal("an input is damaged", path.name, "a JSON object", found[:200]) from error
    if not isinstance(document, dict):
        raise _refusal("an input is damaged", path.name, "a JSON object", repr(document)[:200])
    return document


def _faults(folder: Path, rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    for row in rows:
        path = folder / row["path"]
        if not path.is_file():
            yield row["path"], row["digest"], "no such file"
        elif path.stat().st_size != row["size_bytes"]:
            yield row["path"], f"{row['size_bytes']} bytes", f"{path.stat().st_size} bytes"
        elif (found := "blake3:" + blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()) != row["digest"]:
            yield row["path"], row["digest"], found


def _data_manifest(folder: Path, wanted: Mapping[str, Any]) -> str:
    found = _digest(_read(folder / wanted["manifest"]["path"]))
    if found != wanted["manifest"]["digest"]:
        raise _refusal("the data has another manifest", "data_manifest", wanted["manifest"]["digest"], found)
    checked_manifest(folder, kind=wanted["kind"])
    return found


def _require_tokenizer(wanted: Mapping[str, Any]) -> None:
    """The ids of the run are this project's; the rank file itself is held against its digest when it is loaded."""
    own = tokenizer_table()
    if dict(wanted) != own:
        raise _refusal("the run is written for another tokenizer", "tokenizer", str(dict(wanted)), str(own))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _refusal("an input is not complete", path.name, "a readable file", error.strerror or "none") from error


def _digest(data: bytes) -> str:
    return "blake3:" + blake3(data).hexdigest()


def _refusal(what: str, where: str, expected: str, found: str) -> RecipeRefused:
    return RecipeRefused(
        what,
        where=where,
        expected=expected,
        found=found,
        next_step="vpstore build stage1 for what is here, or vpstore resolve the inputs that the run names",
    )
