"""The process that runs recorded recipes: one job in on stdin, progress and one result out on stdout.

Place in the path: started by `running` with the recorded tree first on the path. Whatever a recipe prints goes to
stderr, so that it cannot be taken for a message.
Invariants: no module of the checkout's own root can be imported, and a recipe file that was loaded from elsewhere than
the tree is an error; the process ends when whoever started it does.

Example:
    python -P -m vpstore.rebuilding.worker < job.json
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vpstore.errors import UsageError, VpstoreError
from vpstore.missing import missing_package
from vpstore.project_code import left
from vpstore.runner import Prepared, PreparedSource, ResolvedInput, Selection, Staged, StagedFile
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import TokenizerRecord
from vpstore.storage.compiled import keep_compiled

ERROR_FIELDS = ("what", "where", "expected", "found", "next_step")


@dataclass(frozen=True)
class Job:
    """One run of a recipe, as plain values that another process can be given."""

    runner: str
    root: Path  # of the checkout, from which nothing may be imported
    tree: Path  # the recorded files, and what moves bytes around them
    recipe_files: tuple[str, ...]  # paths in the tree
    prepared: Prepared
    inputs: Mapping[str, ResolvedInput]
    scratch: Path
    selection: Selection | None = None  # None: the whole artifact

    def to_json(self) -> dict[str, Any]:
        """The job as it is sent."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Job:
        """The job as it was sent."""
        prepared, selection = value["prepared"], value["selection"]
        sources = tuple(replace(PreparedSource(**row), path=Path(row["path"])) for row in prepared["sources"])
        tokenizer = prepared["tokenizer"]
        if tokenizer is not None:
            tokenizer = TokenizerRecord(tokenizer[0], Digest(tokenizer[1]), tokenizer[2])
        for name in ("code_always", "code_exclude"):
            prepared[name] = tuple(prepared[name])
        inputs = {
            role: ResolvedInput(role, row["ref"], Digest(row["artifact"]), Path(row["path"]))
            for role, row in value["inputs"].items()
        }
        return cls(
            runner=value["runner"],
            root=Path(value["root"]),
            tree=Path(value["tree"]),
            recipe_files=tuple(value["recipe_files"]),
            prepared=Prepared(**{**prepared, "sources": sources, "tokenizer": tokenizer}),
            inputs=inputs,
            scratch=Path(value["scratch"]),
            selection=None if selection is None else _selection(selection),
        )


@dataclass(frozen=True)
class Result:
    """What a job gave, and under which environment."""

    staged: Staged
    environment: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """The result as it is sent."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Result:
        """The result as it was sent."""
        files, intermediates = (
            [StagedFile(row["path"], row["media_type"], Path(row["source"])) for row in value["staged"][name]]
            for name in ("files", "intermediates")
        )
        return cls(Staged(files, intermediates), value["environment"])


def _selection(value: dict[str, Any]) -> Selection:
    given = value["intermediates"]
    paths = None if given is None else {name: Path(path) for name, path in given.items()}
    return Selection(tuple(value["names"]), paths)


def perform(job: Job, progress: Any) -> Result:
    """Import the runner from the tree and run the job.

    Raises:  UsageError: a runner that cannot compute single tensors; VpstoreError: code of the checkout was loaded;
             whatever the runner raises.
    """
    own = os.path.realpath(job.root)
    sys.path[:] = [place for place in sys.path if os.path.realpath(place or ".") != own]
    keep_compiled()
    runner = importlib.import_module(job.runner)
    environment = runner.environment(job.prepared)
    if job.selection is None:
        staged = runner.produce(job.prepared, job.inputs, job.scratch, progress)
    elif hasattr(runner, "recompute"):
        staged = runner.recompute(job.prepared, job.inputs, job.selection, job.scratch, progress)
    else:
        raise UsageError(
            "this project's runner cannot compute single tensors",
            where=job.runner,
            expected="a function recompute",
            next_step="vpstore reproduce REF without --sample and --tensor builds the whole artifact again",
        )
    _refuse_strangers(job)
    return Result(staged, environment)


def _refuse_strangers(job: Job) -> None:
    for path in job.recipe_files:
        name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        found = getattr(sys.modules.get(name), "__file__", None)
        if found is not None and os.path.realpath(found) != os.path.realpath(job.tree / path):
            raise VpstoreError(
                "a recipe file was not loaded from the recorded ones",
                where=name,
                expected=path,
                found=found,
                next_step="let the runner import recipes by name only, and leave sys.path as it is",
            )


def main() -> None:
    """Do one job."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def send(kind: str, value: Any) -> None:
        out.write(json.dumps({kind: value}, default=str) + "\n")

    job = Job.from_json(json.loads(_line()))
    threading.Thread(target=_end_with_starter, daemon=True).start()
    try:
        result = perform(job, lambda label, done, total: send("progress", [label, done, total]))
        send("result", result.to_json())
    except VpstoreError as error:
        send("error", _fields(error))
    except SystemExit as leaving:
        traceback.print_exc()
        send("error", _fields(left(leaving, job.prepared.recipe_entry, job.tree)))
    except Exception as error:  # whatever old recipes and a newer frame do to each other
        lacking = missing_package(error, [job.root, job.tree], where=job.prepared.recipe_entry)
        if lacking is not None:
            send("error", _fields(lacking))
            return
        traceback.print_exc()
        send("failure", f"{type(error).__name__}: {error}"[:2000])


def _fields(error: VpstoreError) -> dict[str, str]:
    return {"kind": type(error).__name__, **{name: getattr(error, name) for name in ERROR_FIELDS}}


def _line() -> bytes:
    data = bytearray()
    while not data.endswith(b"\n"):
        more = os.read(0, 1 << 16)
        if not more:
            break
        data += more
    return bytes(data)


def _end_with_starter() -> None:
    """The other end of stdin stays open for as long as somebody waits for this process."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
