"""Fixtures of the store's tests: a small project that is not this repository's own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_project import Project, make_project

from vpstore.storage.stamps import Stamps
from vpstore.storage.store import Store

MEMORY = "/dev/shm"


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory where there is one: the store fsyncs every file, and a busy disk takes its time."""
    if os.access(MEMORY, os.W_OK):
        with tempfile.TemporaryDirectory(dir=MEMORY, prefix="vpstore-test-") as folder:
            yield Path(folder)
    else:
        yield tmp_path_factory.mktemp("store")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A checkout in which nothing is built."""
    root = tmp_path / "fresh"
    root.mkdir()
    return make_project(root, tmp_path / "fresh-cache")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A checkout in which everything is built; tests get copies."""
    folder = tmp_path_factory.mktemp("template")
    (folder / "checkout").mkdir()
    made = make_project(folder / "checkout", folder / "cache")
    made.run("build", "--all")
    return made


@pytest.fixture
def built(template: Project, tmp_path: Path) -> Project:
    """A checkout in which everything is built."""
    shutil.copytree(template.root, tmp_path / "checkout", symlinks=True)
    return Project(tmp_path / "checkout", tmp_path / "cache")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store with stamps of its own."""
    return Store.create(tmp_path / "store", stamps=Stamps(tmp_path / "stamps"))
