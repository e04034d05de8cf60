"""Fixtures of the tests of keeping and deleting: checkouts of the small project that share a store."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

STORE_TESTS = Path(__file__).resolve().parents[1] / "store"  # the small project lives there
if str(STORE_TESTS) not in sys.path:
    sys.path.append(str(STORE_TESTS))

from shared_store import Team, unload_recipes  # noqa: E402 - it needs the path above
from stage import Stage  # noqa: E402

MEMORY = "/dev/shm"


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory where there is one: the store fsyncs every file, and a busy disk takes its time."""
    if os.access(MEMORY, os.W_OK):
        with tempfile.TemporaryDirectory(dir=MEMORY, prefix="vpstore-keep-") as folder:
            yield Path(folder)
    else:
        yield tmp_path_factory.mktemp("keep")


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Team:
    """A folder for checkouts with one store; commands that run in this process find it, too."""
    monkeypatch.setenv("VPSTORE_ROOT", str(tmp_path / "store"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Team(tmp_path)


@pytest.fixture(autouse=True)
def _no_recipes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What one test loads of its project stays in it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    unload_recipes()
    yield
    unload_recipes()


@pytest.fixture(scope="session")
def stage() -> Iterator[Stage]:
    """The process that runs commands side by side and stops them where it is told."""
    started = Stage()
    yield started
    started.close()
