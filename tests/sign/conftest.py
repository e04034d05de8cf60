"""The small project of the store's tests, with its fixtures, for the tests of signatures and exports."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

STORE_TESTS = Path(__file__).resolve().parents[1] / "store"
if str(STORE_TESTS) not in sys.path:
    sys.path.append(str(STORE_TESTS))

_spec = importlib.util.spec_from_file_location("store_fixtures", STORE_TESTS / "conftest.py")
assert _spec is not None
assert _spec.loader is not None
_fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_fixtures)
tmp_path, template = _fixtures.tmp_path, _fixtures.template
built, store = _fixtures.built, _fixtures.store

from signing_tools import Keys  # noqa: E402 - found once the folder above is on the path


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    """A folder of keys, each made when it is asked for."""
    folder = tmp_path / "keys"
    folder.mkdir()
    return Keys(folder)
