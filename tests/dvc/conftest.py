"""Fixtures of the tests that drive DVC: one checkout is built, tests get copies."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

STORE_TESTS = Path(__file__).resolve().parents[1] / "store"  # the command server lives there
if str(STORE_TESTS) not in sys.path:
    sys.path.append(str(STORE_TESTS))

from press_project import Press  # noqa: E402 - it needs the path above

MEMORY = "/dev/shm"


def _folder(factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory where there is one: stores and DVC fsync much, and a busy disk takes its time."""
    if os.access(MEMORY, os.W_OK):
        with tempfile.TemporaryDirectory(dir=MEMORY, prefix="vpstore-dvc-") as folder:
            yield Path(folder)
    else:
        yield factory.mktemp("dvc")


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of the test's own."""
    yield from _folder(tmp_path_factory)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Press]:
    """A checkout in which `dvc repro` has run once and all that git sees is committed; not to be changed."""
    for folder in _folder(tmp_path_factory):
        press = Press.create(folder / "checkout", folder / "home")
        press.repro()
        press.commit("what was built")
        yield press


@pytest.fixture
def press(template: Press, tmp_path: Path) -> Press:
    """A checkout in which everything is built."""
    return template.copy(tmp_path)
