"""Compiled modules in a person's own cache: used where Python keeps none, and never for another source."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

CODE = """
import json
from importlib.machinery import SourceFileLoader
from vpstore.storage.compiled import keep_compiled
compiled, given = [], SourceFileLoader.source_to_code
def counted(self, data, path, **more):
    compiled.append(str(path).rpartition("/")[2])
    return given(self, data, path, **more)
SourceFileLoader.source_to_code = counted
keep_compiled()
import installed.part, own
print(json.dumps([installed.part.VALUE, own.VALUE, compiled]))
"""


class Place:
    """A folder of installed packages, a module of a checkout beside it, and a cache."""

    def __init__(self, root: Path) -> None:
        self.root, self.part = root, root / "site-packages/installed/part.py"
        self.part.parent.mkdir(parents=True)
        (self.part.parent / "__init__.py").write_text("")
        self.part.write_text("VALUE = 1")
        (root / "own.py").write_text("VALUE = 1")
        time.sleep(0.06)  # a source that changed just now is not kept

    @property
    def kept(self) -> list[Path]:
        folder = self.root / "cache/vpstore/compiled"
        return sorted(folder.iterdir()) if folder.exists() else []

    def load(self, **variables: str) -> list[object]:
        """What both modules say, and which files were compiled, in a process of its own."""
        given = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(self.root / "site-packages"), str(self.root), *sys.path]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "XDG_CACHE_HOME": str(self.root / "cache"),
            **variables,
        }
        done = subprocess.run([sys.executable, "-c", CODE], env=given, capture_output=True, text=True, check=True)
        found: list[object] = json.loads(done.stdout)
        return found


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_an_installed_module_is_compiled_once_and_a_checkouts_every_time(place: Place) -> None:
    assert place.load() == [1, 1, ["__init__.py", "part.py", "own.py"]]
    assert len(place.kept) == 2
    assert place.load() == [1, 1, ["own.py"]]


def test_a_source_of_equal_size_and_time_is_compiled_again(place: Place) -> None:
    place.load()
    before = place.part.stat()
    place.part.write_text("VALUE = 2")
    os.utime(place.part, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert place.load()[0] == 2


def test_damaged_and_unwritable_caches_are_as_none(place: Place) -> None:
    place.load()
    for path in place.kept:
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
    assert place.load() == [1, 1, ["__init__.py", "part.py", "own.py"]]
    assert place.load(XDG_CACHE_HOME="/dev/null") == [1, 1, ["__init__.py", "part.py", "own.py"]]


def test_where_python_keeps_modules_itself_nothing_is_kept(place: Place) -> None:
    assert place.load(PYTHONDONTWRITEBYTECODE="") == [1, 1, ["__init__.py", "part.py", "own.py"]]
    assert place.kept == []
    assert place.load() == [1, 1, []]  # and what Python has kept is used
