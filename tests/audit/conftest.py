"""The small project of the store's tests, with its fixtures, for the tests of audit, graph, why and diff."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

STORE_TESTS = Path(__file__).resolve().parents[1] / "store"
if str(STORE_TESTS) not in sys.path:
    sys.path.append(str(STORE_TESTS))

from forger import Forger  # noqa: E402 - they need the path above
from orchard import make_orchard  # noqa: E402
from small_project import Project  # noqa: E402

_spec = importlib.util.spec_from_file_location("store_fixtures", STORE_TESTS / "conftest.py")
assert _spec is not None
assert _spec.loader is not None
_fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_fixtures)
tmp_path, project, template = _fixtures.tmp_path, _fixtures.project, _fixtures.template
built, store = _fixtures.built, _fixtures.store


@pytest.fixture(scope="session")
def orchard_template(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """An orchard in which everything is built and locked; tests get copies."""
    folder = tmp_path_factory.mktemp("orchard")
    (folder / "checkout").mkdir()
    made = make_orchard(folder / "checkout", folder / "cache")
    made.run("build", "--all")
    made.run("lock")
    return made


@pytest.fixture
def orchard(orchard_template: Project, tmp_path: Path) -> Project:
    """An orchard in which everything is built and locked."""
    shutil.copytree(orchard_template.root, tmp_path / "checkout", symlinks=True)
    return Project(tmp_path / "checkout", tmp_path / "cache")


@pytest.fixture
def forger(orchard: Project) -> Forger:
    """Somebody who may write everything in the orchard."""
    return Forger(orchard)
