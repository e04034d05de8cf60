"""Fixtures of the tests that build again: a small project whose recipe is a plan, built once, copied for each test."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "store"))  # the small project

from garden_project import make_garden
from small_project import Project

MEMORY = "/dev/shm"


def _folder(factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory where there is one: the store fsyncs every file, and a busy disk takes its time."""
    if os.access(MEMORY, os.W_OK):
        with tempfile.TemporaryDirectory(dir=MEMORY, prefix="vpstore-reproduce-") as folder:
            yield Path(folder)
    else:
        yield factory.mktemp("reproduce")


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of the test's own."""
    yield from _folder(tmp_path_factory)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A checkout in which everything is built; tests get copies."""
    for folder in _folder(tmp_path_factory):
        (folder / "checkout").mkdir()
        made = make_garden(folder / "checkout", folder / "cache")
        made.run("build", "--all")
        yield made


@pytest.fixture
def garden(template: Project, tmp_path: Path) -> Project:
    """A checkout in which everything is built."""
    shutil.copytree(template.root, tmp_path / "checkout", symlinks=True)
    return Project(tmp_path / "checkout", tmp_path / "cache")
