"""The fixtures of the store's tests, for the tests of what makes the store quick."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

STORE_TESTS = Path(__file__).resolve().parents[1] / "store"
if str(STORE_TESTS) not in sys.path:
    sys.path.append(str(STORE_TESTS))

_spec = importlib.util.spec_from_file_location("store_fixtures", STORE_TESTS / "conftest.py")
assert _spec is not None
assert _spec.loader is not None
_fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_fixtures)
tmp_path, project, template = _fixtures.tmp_path, _fixtures.project, _fixtures.template
built, store = _fixtures.built, _fixtures.store
