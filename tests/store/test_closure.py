"""The closure of a recipe: exactly the files that make its bytes, found without importing them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vpstore.code import closure
from vpstore.errors import RecipeRefused
from vpstore.schema.digest import Digest

FILES = {
    "farm/__init__.py": "",
    "farm/entry.py": "import json\nimport torch\nfrom farm import soil\nfrom farm.deep.well import water\n\n"
    "def f():\n    import farm.late\n",
    "farm/soil.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from farm.types import T\n",
    "farm/types.py": "T = int\n",
    "farm/late.py": "",
    "farm/unused.py": "",
    "farm/deep/__init__.py": "from . import pump\n",
    "farm/deep/well.py": "from ..soil import x\nwater = 1\n",
    "farm/deep/pump.py": "from .gear import wheel\n",
    "farm/deep/gear.py": "wheel = 1\n",
    "farm/run.py": "import farm.unused\n",
    "farm/odd/lonely.py": "",
}


@pytest.fixture
def farm(tmp_path: Path) -> Path:
    for path, text in FILES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def paths(root: Path, entry: str = "farm.entry", **options: tuple[str, ...]) -> list[str]:
    return [path for path, _ in closure(root, entry, **options)]


def test_everything_that_is_imported_and_nothing_else(farm: Path) -> None:
    assert paths(farm) == sorted(
        f"farm/{name}.py"
        for name in (
            "__init__",
            "entry",
            "soil",
            "types",
            "late",
            "deep/__init__",
            "deep/well",
            "deep/pump",
            "deep/gear",
        )
    )


def test_digests_are_of_the_bytes(farm: Path) -> None:
    assert all(digest == Digest.of((farm / path).read_bytes()) for path, digest in closure(farm, "farm.entry"))


def test_one_character_in_a_file_of_the_closure_changes_it_and_elsewhere_does_not(farm: Path) -> None:
    before = closure(farm, "farm.entry")
    (farm / "farm/unused.py").write_text("#")
    assert closure(farm, "farm.entry") == before
    (farm / "farm/deep/gear.py").write_text("wheel = 2\n")
    assert closure(farm, "farm.entry") != before


def test_always_and_exclude(farm: Path) -> None:
    assert "farm/unused.py" in paths(farm, always=("farm.unused",))
    excluded = paths(farm, exclude=("farm.deep", "farm.late"))
    assert not any("deep" in path or "late" in path for path in excluded)
    assert "farm/unused.py" not in paths(farm, always=("farm.run",), exclude=("farm.run",))


def test_a_package_without_init_is_followed(farm: Path) -> None:
    (farm / "farm/entry.py").write_text("from farm.odd import lonely\n")
    assert "farm/odd/lonely.py" in paths(farm)


@pytest.mark.parametrize(
    "text",
    [
        "import importlib\nimportlib.import_module('farm.late')",
        "from importlib import import_module",
        "from importlib import util",
        "import importlib.util",
        "import importlib.metadata\nimportlib.import_module('x')",
        "__import__('farm.late')",
        "exec('import farm.late')",
        "f = eval",
        "import runpy",
        "import builtins",
        "from farm.deep import *",
        "from ...above import x",
        "def (",
        "x = 1\0",
    ],
)
def test_what_cannot_be_seen_beforehand_is_refused(farm: Path, text: str) -> None:
    (farm / "farm/soil.py").write_text(text)
    with pytest.raises(RecipeRefused) as caught:
        closure(farm, "farm.entry")
    assert caught.value.where


@pytest.mark.parametrize(
    "text", ["model.eval()", "from importlib import metadata", "import importlib.metadata", "import re\nre.compile('')"]
)
def test_what_only_looks_like_it_is_taken(farm: Path, text: str) -> None:
    (farm / "farm/late.py").write_text(text)
    assert "farm/late.py" in paths(farm)


def test_an_absent_entry_is_refused(farm: Path) -> None:
    with pytest.raises(RecipeRefused, match="no such module"):
        closure(farm, "farm.nothing")


def test_a_dynamic_import_outside_the_closure_is_nobodys_business(farm: Path) -> None:
    (farm / "farm/unused.py").write_text("exec('1')")
    assert paths(farm)
