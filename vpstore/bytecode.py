"""Compiled modules that would bring back what their source said before.

Place in the path: under the runner, before any of the project's modules is imported. Python compares size and whole
seconds of mtime only: a params module edited twice within a second, or with its times put back, would otherwise run as
it was, and give the key of what it was.
Invariants: nothing outside the checkout is removed; what a link brings in from there is loaded from its source instead.

Example:
    drop_stale_bytecode(root, root / "recipes")
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    SourceFileLoader,
)
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any, Final, NoReturn

from vpstore.errors import VpstoreError
from vpstore.storage import atomic, beneath

_outside: Final[set[str]] = set()  # folders whose compiled modules are neither removed nor used


def drop_stale_bytecode(root: Path, package: Path) -> None:
    """Remove compiled modules that are older than the last change of their source.

    Args:    root: of the checkout; package: a folder of it. A link may lead to it, or to its `__pycache__`.
    """
    folders: set[Path] = set()
    for source in package.rglob("*.py") if package.is_dir() else ():
        compiled = Path(cache_from_source(str(source)))
        if source.parent not in folders:
            folders.add(source.parent)
            _mind_links(root, source.parent, compiled.parent)
        with suppress(OSError):  # absent, or another user's: Python then looks at the times, as ever
            if compiled.stat().st_mtime_ns <= source.stat().st_ctime_ns:
                _remove(root, compiled, source.parent)


def _mind_links(root: Path, folder: Path, cache: Path) -> None:
    """Let Python keep nothing compiled where a link leads out: it follows links."""
    for place in (folder, cache):
        if not place.is_relative_to(root) or not (place == folder or place.is_symlink()):
            continue
        try:
            with beneath.opened(root, place, create=False):
                pass
        except (VpstoreError, OSError):
            # Of this process and of those that it starts; a package's own module is loaded by the folder above.
            sys.dont_write_bytecode = True
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            _load_from_source(folder)
            _load_from_source(folder.parent)
            return


def _remove(root: Path, compiled: Path, folder: Path) -> None:
    if not compiled.is_relative_to(root):  # where PYTHONPYCACHEPREFIX says
        atomic.remove(compiled)
        return
    try:
        with beneath.opened(root, compiled.parent, create=False) as place:
            atomic.remove(place / compiled.name)
    except VpstoreError:  # somebody else's
        _load_from_source(folder)


class _FromSource(SourceFileLoader):
    """Loads modules as if none had ever been compiled, and keeps nothing compiled."""

    def path_stats(self, path: Any) -> NoReturn:
        """What a compiled module is held against: there is nothing."""
        raise OSError


def _load_from_source(folder: Path) -> None:
    if not _outside:
        sys.path_hooks.insert(0, _finder)
    _outside.add(str(folder))
    sys.path_importer_cache.pop(str(folder), None)


def _finder(folder: str) -> FileFinder:
    if folder not in _outside:
        raise ImportError
    return FileFinder(folder, (ExtensionFileLoader, EXTENSION_SUFFIXES), (_FromSource, SOURCE_SUFFIXES))
