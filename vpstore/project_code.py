"""Runs code of the project, and makes whatever comes of it an error of ours.

Place in the path: around the runner, which may fail in any way and may try to end the process. A mistake in a file is
told with its place alone; a failure of the code itself comes with the lines that led to it.
Invariants: errors of ours, Ctrl-C and the operating system's refusals go through as they are; nothing that the project
raises, SystemExit included, ends a command as if it had succeeded; what it does past Python is `cli.supervised`'s.

Example:
    with project_code("the runner's prepare", root, files=declared): prepared = module.prepare(checkout, "seed", "main")
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tomllib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import vpstore
from vpstore.errors import RecipeRefused, UsageError, VpstoreError
from vpstore.missing import missing_package
from vpstore.storage.refusals import as_error

_OURS: Final = os.path.dirname(os.path.realpath(vpstore.__file__))
_PYTHON: Final = os.path.dirname(os.__file__)
_FULL: Final = 1 << 20  # with less room a library's own words for a full disk are not to be had
_READERS: Final[Mapping[str, tuple[str, Callable[[str], Any]]]] = {
    ".toml": ("TOML", tomllib.loads),
    ".json": ("JSON", json.loads),
}


@contextmanager
def project_code(
    what: str, root: Path, *, files: Iterable[Path] = (), scratch: Path | None = None, checkout: Path | None = None
) -> Iterator[None]:
    """Run code of the project that lies in `root`.

    Args:    what: the part that runs, for a person; files: its configuration; scratch: where it writes;
             checkout: what `root` was laid out from, if it is a tree of its own.
    Raises:  UsageError: a file of the configuration or a module cannot be read, or a package is not installed;
             RecipeRefused: it tried to end the process; VpstoreError: it failed, with the lines that led there as
             `trace`; OSError: a refusal.
    """
    try:
        yield
    except VpstoreError:
        raise
    except SystemExit as leaving:
        raise left(leaving, what, root) from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # some libraries' own kinds are no Exception
        if isinstance(error, OSError) and as_error(error, "", what, is_ours=False) is not None:
            raise
        lacking = missing_package(error, [checkout or root, root], where=_place(error, root) or what)
        raise lacking or _mistake(error, root, files) or _failure(error, what, root, scratch) from error


def left(leaving: SystemExit, what: str, root: Path) -> RecipeRefused:
    """The error of code that called sys.exit, or raised SystemExit: with any code it is no result."""
    return RecipeRefused(
        "the project's code tried to end the program",
        where=_place(leaving, root) or what,
        expected="a result, or an exception that says why there is none",
        found=f"SystemExit({leaving.code!r})",
        next_step="raise an exception instead of calling sys.exit; nothing was published",
    )


def _mistake(error: BaseException, root: Path, files: Iterable[Path]) -> UsageError | None:
    """What a person has to correct in a file, if that is why the code failed."""
    if isinstance(error, SyntaxError) and os.path.isfile(error.filename or ""):
        where = f"{_relative(str(error.filename), root)}:{error.lineno}"
        return UsageError(
            "a module is not Python", where=where, found=error.msg, next_step="correct it there, then run this again"
        )
    for path in files:
        if fault := _fault_of(path):
            what, found = fault
            next_step = "correct it there, then run the command again"
            return UsageError(what, where=_relative(str(path), root), found=found, next_step=next_step)
    return None


def _fault_of(path: Path) -> tuple[str, str] | None:
    """What is wrong with the form of a file: what, and what was found."""
    if path.suffix not in _READERS:
        return None
    kind, read = _READERS[path.suffix]
    try:
        read(path.read_text(encoding="utf-8"))
    except OSError as error:
        return "a configuration file cannot be read", str(error.strerror)
    except (ValueError, RecursionError) as error:
        return f"a file is not {kind}", " ".join(str(error).split())[:200]
    return None


def _failure(error: BaseException, what: str, root: Path, scratch: Path | None) -> VpstoreError:
    next_step = "correct it there; the lines that led to it are above"
    if scratch is not None and scratch.is_dir() and shutil.disk_usage(scratch).free < _FULL:
        next_step = f"the file system of {scratch} is full: free space on it, then run the command again"
    failed = VpstoreError(
        "the project's code failed",
        where=_place(error, root) or what,
        found=f"{type(error).__name__}: {error}"[:500],
        next_step=next_step,
    )
    failed.trace = "".join(traceback.format_exception(type(error), error, _theirs(error.__traceback__))).rstrip()
    return failed


def checked(value: Any, kind: type, what: str) -> Any:
    """What the project's code returned, if it is of the kind that it has to be.

    Raises:  UsageError.
    """
    if isinstance(value, kind):
        return value
    next_step = f"let it return a {kind.__name__}; vpstore/runner.py says what each function gives"
    raise UsageError(
        "the runner returns something else", where=what, expected=kind.__name__, found=repr(value)[:200],
        next_step=next_step,
    )  # fmt: skip


def _theirs(trace: TracebackType | None) -> TracebackType | None:
    """The traceback without the lines of ours that it begins with."""
    here = trace
    while here is not None and _is_below(here.tb_frame.f_code.co_filename, _OURS, _PYTHON, "<frozen importlib."):
        here = here.tb_next
    return here if here is not None else trace


def _is_below(file: str, *folders: str) -> bool:
    if file.startswith("<"):  # a part of Python itself that has no file
        return file.startswith(folders)
    return any(os.path.realpath(file).startswith(os.path.realpath(folder) + os.sep) for folder in folders)


def _place(error: BaseException, root: Path) -> str:
    """The last line of the project's own that an error went through: file:line; "" if it went through none."""
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if _is_below(file, str(root)) and not _is_below(file, _OURS, sys.prefix):
            found = f"{_relative(file, root)}:{line}"
    return found


def _relative(file: str, root: Path) -> str:
    real = os.path.realpath(file)
    top = os.path.realpath(root) + os.sep
    return real.removeprefix(top) if real.startswith(top) else file
