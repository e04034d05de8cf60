"""Starts the process that runs recipes, and waits for what it gives.

Place in the path: between a job that is laid out and its result. The child's module path is the laid-out tree, then
this program, then what this process has, without the checkout's root.
Invariants: the child is gone when `run` returns or raises, and dies by itself if this process is killed; its answer is
a file, so that nothing it writes or closes is taken for one; an error of the child is raised here as the error it was,
with the lines of the checkout's files.

Example:
    result = run(job, work.narrator)
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import vpstore
from vpstore.errors import RecipeRefused, VpstoreError
from vpstore.narration import Narrator
from vpstore.rebuilding.places import in_checkout
from vpstore.rebuilding.process import Process, started
from vpstore.rebuilding.worker import ERROR_FIELDS, Job, Result
from vpstore.repository import module_places
from vpstore.runner import Needs
from vpstore.storage import atomic

_TOLD: Final = (signal.SIGUSR1, signal.SIGUSR2)  # what people tell a recipe


def run(
    job: Job, narrator: Narrator, *, advice: str = "", needs: Callable[[Needs], None] = lambda found: None
) -> Result:
    """Run a job in a process of its own.

    Args:    advice: what to do if the recorded recipe cannot run under this checkout's runner; needs: told what a build
             takes before it begins, and ends it by raising.
    Raises:  VpstoreError: what the runner raised; the process was killed; the recorded code does not run; OSError: the
             disk refused.
    """
    atomic.make_directory(job.scratch)
    program = _program(job)
    with started(job, _module_path(job, program)) as process, _passing_on(process):
        try:
            _converse(process, job, narrator, needs)
            code = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)  # once, whoever was sent it: it may have something to tidy up
            with suppress(KeyboardInterrupt):
                process.wait()
            raise
    return _outcome(job, code, advice)


@contextmanager
def _passing_on(process: Process) -> Iterator[None]:
    """What people tell a recipe by a signal reaches it, though this process was sent it."""
    is_main = threading.current_thread() is threading.main_thread()
    told = [number for number in _TOLD if is_main and signal.getsignal(number) is signal.SIG_DFL]
    for number in told:
        signal.signal(number, lambda number, frame: process.send_signal(number))
    try:
        yield
    finally:
        for number in told:
            signal.signal(number, signal.SIG_DFL)


def _ended(job: Job, code: int) -> VpstoreError:
    """Why there is no last message: somebody killed the process, or the recipe ended it."""
    where = job.prepared.recipe_entry
    if code < 0:
        return VpstoreError(
            "the process that ran the recipe was killed",
            where=where,
            found=f"signal {-code}",
            next_step="most often the system ran out of memory: give it more, or let the recipe take less",
        )
    return RecipeRefused(
        "the process that ran the recipe ended before there was a result",
        where=where,
        found=f"exit status {code}",
        next_step="look for os._exit in the recipe and in what it calls: an exception would say what is wrong",
    )


def _converse(process: Process, job: Job, narrator: Narrator, needs: Callable[[Needs], None]) -> None:
    """Send the job, and pass on what the process says until it ends, or closes the way to say it."""
    with suppress(BrokenPipeError):
        process.tell(json.dumps(job.to_json(), default=str).encode() + b"\n")
        for message in _messages(process):
            if "progress" in message:
                narrator.progress(*message["progress"])
            elif "needs" in message:
                needs(Needs(**message["needs"]))
                process.tell(b"\n")


def _messages(process: Process) -> Iterator[dict[str, Any]]:
    """Whole lines of JSON; a recipe may write anything into the same pipe, and leave processes that hold it open."""
    data = b""
    while more := process.hear():
        *lines, data = (data + more).split(b"\n")
        for line in lines:
            with suppress(ValueError):
                message = json.loads(line)
                if isinstance(message, dict):
                    yield message


def _outcome(job: Job, code: int, advice: str) -> Result:
    try:
        found: dict[str, Any] = json.loads(job.answer.read_bytes())
    except (FileNotFoundError, ValueError):
        raise _ended(job, code) from None
    if "result" in found:
        return Result.from_json(found["result"])
    if "error" in found:
        fields = {name: in_checkout(text, job) for name, text in found["error"].items()}
        error = _kind(fields["kinds"])(fields["what"], **{name: fields[name] for name in ERROR_FIELDS[1:]})
        error.trace = fields["trace"]
        raise error
    if "refusal" in found:
        number, text, file = found["refusal"]
        raise OSError(number, text, file or None)
    raise VpstoreError(
        "the recorded recipe does not run under this checkout's runner",
        where=f"{job.prepared.recipe_entry}, runner {job.runner}",
        found=found["failure"],
        next_step=advice,
    )


def _kind(names: str) -> type[VpstoreError]:
    """The class of an error by its name, or by those of its bases; the base of all if this program knows none."""
    waiting = [VpstoreError]
    for kind in waiting:
        waiting.extend(kind.__subclasses__())
    known = {kind.__name__: kind for kind in reversed(waiting)}
    return next((known[name] for name in names.split() if name in known), VpstoreError)


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
    own = set(map(os.path.realpath, module_places(job.root)))
    rest = [place for place in sys.path if place and os.path.realpath(place) not in own]
    tree, sources = module_places(job.tree)
    return [str(tree), *([str(sources)] if sources.is_dir() else []), str(program), *rest]
