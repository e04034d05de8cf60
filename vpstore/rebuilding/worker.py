"""The process that runs recipes: one job in on stdin, progress out on stdout, the result in a file.

Place in the path: started by `running` with the laid-out tree first on the path. Whatever a recipe prints goes to
stderr.
Invariants: no module of the checkout's own root can be imported, and a recipe file that was loaded from elsewhere than
the tree is an error; the process ends when whoever started it does.

Example:
    python -P -m vpstore.rebuilding.worker < job.json
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from vpstore.errors import Interrupted, UsageError, VpstoreError
from vpstore.missing import missing_package
from vpstore.project_code import checked, left, project_code
from vpstore.repository import SOURCES, module_places
from vpstore.runner import (
    Needs,
    Pin,
    Prepared,
    PreparedSource,
    ResolvedInput,
    Selection,
    Staged,
    StagedFile,
    TokenizerRecord,
)
from vpstore.schema.digest import Digest
from vpstore.storage import atomic, passing
from vpstore.storage.compiled import keep_compiled

ERROR_FIELDS = ("what", "where", "expected", "found", "next_step")


@dataclass(frozen=True)
class Job:
    """One run of a recipe, as plain values that another process can be given.

    A build is done in the runner's own scratch folder, is asked what it needs first, and the project's failures are
    told as such; what is built again may be old code under a newer frame, which is another thing to say.
    """

    runner: str
    root: Path  # of the checkout, from which nothing may be imported
    tree: Path  # the recipe's files, and what moves bytes around them
    recipe_files: tuple[str, ...]  # paths in the tree
    prepared: Prepared
    inputs: Mapping[str, ResolvedInput]
    scratch: Path
    selection: Selection | None = None  # None: the whole artifact
    purpose: Literal["build", "again"] = "again"
    lines: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # by recipe file: whence each line; not sent

    @property
    def answer(self) -> Path:
        """Where the process leaves its result, or why there is none."""
        return self.tree.parent / "answer.json"

    def to_json(self) -> dict[str, Any]:
        """The job as it is sent."""
        return asdict(replace(self, lines={}))

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Job:
        """The job as it was sent."""
        prepared, selection = value["prepared"], value["selection"]
        sources = tuple(replace(PreparedSource(**row), path=Path(row["path"])) for row in prepared["sources"])
        tokenizer = prepared["tokenizer"]
        if tokenizer is not None:
            tokenizer = TokenizerRecord(tokenizer[0], Digest(tokenizer[1]), tokenizer[2])
        prepared["pins"] = tuple(Pin(role, Digest(digest), attributes) for role, digest, attributes in prepared["pins"])
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
            purpose=value["purpose"],
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


def perform(job: Job, progress: Any, needed: Callable[[Needs], None]) -> Result:
    """Import the runner from the tree and run the job.

    Args:    needed: told what a build takes, and returns when it may go on.
    Raises:  UsageError: a runner that cannot compute single tensors; VpstoreError: code of the checkout was loaded;
             whatever the runner raises.
    """
    own = set(map(os.path.realpath, module_places(job.root)))
    sys.path[:] = [place for place in sys.path if os.path.realpath(place or ".") not in own]
    keep_compiled()
    if job.purpose == "build":
        return _build(job, progress, needed)
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


def _build(job: Job, progress: Any, needed: Callable[[Needs], None]) -> Result:
    """Run a build; a failure of the project's code is told as one."""
    entry = job.prepared.recipe_entry
    arguments = (job.prepared, job.inputs, job.scratch)
    with project_code(entry, job.tree, scratch=job.scratch, checkout=job.root):
        runner = importlib.import_module(job.runner)
        found = runner.needs(*arguments) if callable(getattr(runner, "needs", None)) else None
    if found is not None:
        needed(checked(found, Needs, f"needs of {entry}"))
    with project_code(entry, job.tree, scratch=job.scratch, checkout=job.root):
        staged = runner.produce(*arguments, progress)
    _refuse_strangers(job)
    return Result(checked(staged, Staged, f"produce for {entry}"), {})


def _refuse_strangers(job: Job) -> None:
    for path in job.recipe_files:
        name = path.removesuffix(".py").removesuffix("/__init__").removeprefix(SOURCES).replace("/", ".")
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
    out = os.dup(1)
    os.dup2(2, 1)

    def send(kind: str, value: Any) -> None:
        with suppress(OSError):  # a recipe may have closed it
            os.write(out, json.dumps({kind: value}, default=str).encode() + b"\n")

    may_go_on, process = threading.Event(), os.getpid()

    def needed(needs: Needs) -> None:
        send("needs", asdict(needs))
        may_go_on.wait()

    job = Job.from_json(json.loads(_line()))
    threading.Thread(target=_end_with_starter, args=(may_go_on,), daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        found = _performed(job, lambda label, done, total: send("progress", [label, done, total]), needed)
    except KeyboardInterrupt:
        os._exit(Interrupted.exit_code)  # whoever waits says so
    if os.getpid() != process:  # what a recipe forked answers nothing
        os._exit(0)
    unfinished = job.answer.with_suffix(".new")
    passing.write(unfinished, json.dumps(found, default=str).encode())
    atomic.rename(unfinished, job.answer)


def _performed(job: Job, progress: Any, needed: Callable[[Needs], None]) -> dict[str, Any]:
    """The result of a job, or why there is none."""
    try:
        return {"result": perform(job, progress, needed).to_json()}
    except VpstoreError as error:
        return {"error": _fields(error)}
    except SystemExit as leaving:
        if job.purpose == "again":
            traceback.print_exc()
        return {"error": _fields(left(leaving, job.prepared.recipe_entry, job.tree))}
    except Exception as error:
        if isinstance(error, OSError) and job.purpose == "build":  # the disk refused, which who waits has words for
            return {"refusal": [error.errno, error.strerror, str(error.filename or "")]}
        lacking = missing_package(error, [job.root, job.tree], where=job.prepared.recipe_entry)
        if lacking is not None:
            return {"error": _fields(lacking)}
        traceback.print_exc()  # whatever old recipes and a newer frame do to each other
        return {"failure": f"{type(error).__name__}: {error}"[:2000]}


def _fields(error: VpstoreError) -> dict[str, str]:
    kinds = " ".join(kind.__name__ for kind in type(error).__mro__)
    return {"kinds": kinds, "trace": error.trace, **{name: getattr(error, name) for name in ERROR_FIELDS}}


def _line() -> bytes:
    data = bytearray()
    while not data.endswith(b"\n"):
        more = os.read(0, 1 << 16)
        if not more:
            break
        data += more
    return bytes(data)


def _end_with_starter(may_go_on: threading.Event) -> None:
    """The other end of stdin stays open for as long as somebody waits for this process; a byte lets it go on."""
    while os.read(0, 1):
        may_go_on.set()
    os._exit(1)


if __name__ == "__main__":
    main()
