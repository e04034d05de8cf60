"""Which files decide what a piece of Python code answers: watched from outside while it runs.

Place in the path: under the memory of prepared stages. The project's runner is code of its own: it reads what it likes
and imports what it likes. Python's audit events show every file it opens and every folder it lists; the loaded modules
are files as well; and a file that is not there decides, too, as it could shadow a module or switch something on, so
every folder of the checkout, and every folder in which a module was or would be looked for, is among the witnesses.
Invariants: what cannot be watched (a child process, a connection, a database, a file that is written) makes the answer
unfit to be remembered, never wrong; only a program that said `begin` before it loaded any project code is watched.
Not watched, and part of the question instead: environment variables, the working directory, the version of Python.
What the interpreter loads at its own start (site, `.pth` files, sitecustomize) counts with the files of its modules.

Example:
    with Observation() as seen: answer = work_out()
    paths = seen.witnesses(root, outside=(root / "weights",))
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

_UNSEEN: Final = frozenset({
    "ctypes.dlopen", "os.chdir", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system",
    "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "sqlite3.connect", "subprocess.Popen",
})  # fmt: skip
_WRITING: Final = os.O_WRONLY | os.O_RDWR
# What may be loaded before `begin` where the main program is another's: the standard library and what we need.
_EARLY: Final = frozenset({"vpstore", "click", "blake3", "__main__", "_distutils_hack", "sitecustomize"})
_MAX_FOLDERS: Final = 2000  # a tree with more is not watched

_begun_ns: int | None = None
_current: Observation | None = None
_is_hooked = False


def begin() -> None:
    """Say that this process has only just begun and has loaded nothing of any project yet; ignored if it has."""
    global _begun_ns
    if _begun_ns is None and (_is_our_command() or _has_loaded_little()):
        _begun_ns = time.time_ns()


def _is_our_command() -> bool:
    """Whether this process is `vpstore` or `python -m vpstore`: whatever is loaded, the start of Python loaded it."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return bool(spec.name == "vpstore.__main__")
    return os.path.basename(getattr(main, "__file__", None) or "") == "vpstore"


def _has_loaded_little() -> bool:
    tops = {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names - _EARLY
    return all(name.startswith(("__editable__", "_virtualenv")) for name in tops)


def begun_ns() -> int | None:
    """The moment of `begin`; None in a process whose modules may be older than their files."""
    return _begun_ns


class Observation:
    """What was opened and listed between enter and exit."""

    def __init__(self) -> None:
        self._paths: set[str] = set()
        self._is_complete = _begun_ns is not None

    def __enter__(self) -> Observation:
        """Watch from now on; within another observation, that one goes on seeing everything, too."""
        global _current, _is_hooked
        self._outer = _current
        _current = self
        if not _is_hooked and _begun_ns is not None:
            sys.addaudithook(_hook)
            _is_hooked = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching."""
        global _current
        _current = self._outer
        if self._outer is not None:
            self._outer._paths |= self._paths
            self._outer._is_complete &= self._is_complete

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Take one audit event."""
        if event in _UNSEEN:
            self._is_complete = False
        elif event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _WRITING:
                self._is_complete &= ".pyc" in str(path)  # compiled modules are by-products
            else:
                self._add(path)
        elif event in ("os.listdir", "os.scandir"):
            self._add("." if arguments[0] is None else arguments[0])

    def _add(self, path: object) -> None:
        if isinstance(path, (str, bytes, os.PathLike)):
            self._paths.add(os.path.abspath(os.fsdecode(path)))
        elif not isinstance(path, int):  # a number is a file that was opened under its name before
            self._is_complete = False

    def witnesses(self, root: Path, *, outside: Sequence[Path]) -> set[str] | None:
        """Every file and folder that decided what happened, or None if that cannot be told.

        Args:    root: of the checkout, all of whose folders count, apart from hidden ones and those in `outside`.
        """
        folders = list(_folders(root, {str(path) for path in outside}))
        if not self._is_complete or len(folders) > _MAX_FOLDERS:
            return None
        sources = {source for path in self._paths if (source := _source_of(path)) is not None}
        found = {*self._paths, *sources, *folders, *_module_files(), *_search_folders()}
        # Folders that a symbolic link brings into the checkout were not walked.
        for path in [path for path in found if path.startswith(f"{root}{os.sep}")]:
            beside = (os.path.dirname(path), os.path.splitext(path)[0])
            found.update(folder for folder in beside if os.path.isdir(folder))
        return {path if os.path.lexists(path) else _nearest(path) for path in found if not path.startswith("/proc/")}


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _current is not None:
        _current.note(event, arguments)


def _folders(root: Path, outside: set[str]) -> Iterator[str]:
    """Folders below `root`, itself included; environments, caches and hidden ones are left out."""
    for count, (folder, names, files) in enumerate(os.walk(root)):
        if "pyvenv.cfg" in files:
            names.clear()
            continue
        names[:] = [
            name
            for name in names
            if not name.startswith(".") and name != "__pycache__" and os.path.join(folder, name) not in outside
        ]
        yield folder
        yield from (path for name in names if os.path.islink(path := os.path.join(folder, name)))
        if count > _MAX_FOLDERS:
            return


def _module_files() -> Iterator[str]:
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str):
            yield os.path.abspath(file)


def _search_folders() -> Iterator[str]:
    """Where a file could appear, or could change, that another import of the loaded modules would find first."""
    places = {name: list(sys.path) for name in sys.modules if "." not in name}
    for name, module in list(sys.modules.items()):
        if "." in name and (package := sys.modules.get(name.rpartition(".")[0])) is not None:
            places[name] = list(getattr(package, "__path__", ()))
        yield from map(os.path.abspath, getattr(module, "__path__", ()))
    for name, folders in places.items():
        last = name.rpartition(".")[2]
        yield from (inner for folder in folders if os.path.isdir(inner := os.path.abspath(os.path.join(folder, last))))
    for folder in sys.path:
        yield os.path.abspath(folder)
        if os.path.isdir(folder):
            yield from (entry.path for entry in os.scandir(folder) if entry.name.endswith((".pth", ".egg-link")))


def _source_of(path: str) -> str | None:
    """The source of a compiled module that was opened."""
    from importlib.util import source_from_cache

    if not path.endswith(".pyc"):
        return None
    try:
        return source_from_cache(path)
    except ValueError:
        return None


def _nearest(path: str) -> str:
    """The folder in which `path`, or what leads to it, would have to appear."""
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path
