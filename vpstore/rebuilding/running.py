"""Starts the process that runs recorded recipes, and waits for what it gives.

Place in the path: between a job that is laid out and its result. The child's module path is the recorded tree, then
this program, then what this process has, without the checkout's root.
Invariants: the child is gone when `run` returns or raises, and dies by itself if this process is killed; an error of
the child is raised here as the error it was.

Example:
    result = run(job, work.narrator)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import vpstore
from vpstore.errors import VpstoreError
from vpstore.narration import Narrator
from vpstore.rebuilding.worker import ERROR_FIELDS, Job, Result
from vpstore.storage import atomic


def run(job: Job, narrator: Narrator, *, advice: str) -> Result:
    """Run a job in a process of its own.

    Args:    advice: what to do if the recorded recipe cannot run under this checkout's runner.
    Raises:  VpstoreError: what the runner raised; the process was killed; the recorded code does not run.
    """
    atomic.make_directory(job.scratch)
    program = _program(job)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(_module_path(job, program))}
    command = [sys.executable, "-P", "-m", "vpstore.rebuilding.worker"]
    with subprocess.Popen(
        command,
        cwd=job.scratch,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for this process, which then ends the child
    ) as process:
        try:
            found = _converse(process, job, narrator)
        finally:
            process.kill()
    if found is None:
        raise _ended(job, process.returncode)
    return _outcome(job, found, advice)


def _ended(job: Job, code: int) -> VpstoreError:
    """Why there is no last message: somebody killed the process, or the recipe ended it."""
    where = job.prepared.recipe_entry
    if code < 0:
        return VpstoreError(
            "the process that ran the recorded recipe was killed",
            where=where,
            found=f"signal {-code}",
            next_step="most often the system ran out of memory: give it more, or sample with fewer tensors",
        )
    return VpstoreError(
        "the process that ran the recorded recipe ended before there was a result",
        where=where,
        found=f"exit {code}",
        next_step="look for os._exit in the recipe and in what it calls: an exception would say what is wrong",
    )


def _converse(process: subprocess.Popen[bytes], job: Job, narrator: Narrator) -> dict[str, Any] | None:
    """Send the job, pass progress on, and return the last message; None if the child died without one."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(job.to_json(), default=str).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    for message in _messages(process.stdout):
        if "progress" not in message:
            return message
        narrator.progress(*message["progress"])
    process.wait()
    return None


def _messages(stream: IO[bytes]) -> Iterator[dict[str, Any]]:
    for line in stream:
        message: dict[str, Any] = json.loads(line)
        yield message


def _outcome(job: Job, found: dict[str, Any], advice: str) -> Result:
    if "result" in found:
        return Result.from_json(found["result"])
    if "error" in found:
        fields = found["error"]
        raise _kind(fields["kind"])(fields["what"], **{name: fields[name] for name in ERROR_FIELDS[1:]})
    raise VpstoreError(
        "the recorded recipe does not run under this checkout's runner",
        where=f"{job.prepared.recipe_entry}, runner {job.runner}",
        found=found["failure"],
        next_step=advice,
    )


def _kind(name: str) -> type[VpstoreError]:
    """The class of an error by its name; the base for one that this program does not know."""
    waiting = [VpstoreError]
    for kind in waiting:
        if kind.__name__ == name:
            return kind
        waiting.extend(kind.__subclasses__())
    return VpstoreError


def _program(job: Job) -> Path:
    """A folder with this program in it, wherever it is installed.

    Where the checkout has the program, the tree has it too: a runner may ask which packages are the repository's own.
    """
    program = job.tree if (job.root / "vpstore").is_dir() else job.tree.parent / "program"
    atomic.make_directory(program)
    link = program / "vpstore"
    if not link.is_symlink():
        atomic.link(link, os.path.realpath(Path(vpstore.__file__).parent))
    return program


def _module_path(job: Job, program: Path) -> list[str]:
    own = os.path.realpath(job.root)
    rest = [place for place in sys.path if place and os.path.realpath(place) != own]
    return [str(job.tree), str(program), *rest]
