"""Fixtures of the fault matrix: the store's small project, and processes forked from one that imported the program."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "store"))  # the small project and its damage

from disk_matrix import Bench
from fork_server import ForkServer
from small_project import Project, make_project

MEMORY = "/dev/shm"


def _folder(factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory where there is one: thousands of small files are written and fsynced."""
    if os.access(MEMORY, os.W_OK):
        with tempfile.TemporaryDirectory(dir=MEMORY, prefix="vpstore-faults-") as folder:
            yield Path(folder)
    else:
        yield factory.mktemp("faults")


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of the test's own."""
    yield from _folder(tmp_path_factory)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A checkout in which everything is built and locked; tests get copies."""
    for folder in _folder(tmp_path_factory):
        (folder / "checkout").mkdir()
        made = make_project(folder / "checkout", folder / "cache")
        made.run("build", "--all")
        made.run("lock")
        yield made


@pytest.fixture
def built(template: Project, tmp_path: Path) -> Project:
    """A checkout in which everything is built and locked."""
    shutil.copytree(template.root, tmp_path / "checkout", symlinks=True)
    return Project(tmp_path / "checkout", tmp_path / "cache")


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """What the sweeps of the faulty disk start from."""
    for folder in _folder(tmp_path_factory):
        with ForkServer() as server:
            yield Bench.create(folder / "bench", server)
