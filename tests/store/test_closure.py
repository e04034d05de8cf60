"""The closure of a recipe: exactly the files that make its bytes, found without importing them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vpstore.code import closure
from vpstore.errors import RecipeRefused
from vpstore.schema.digest import Digest

FILES = {
    "small/__init__.py": "",
    "small/entry.py": "import json\nimport torch\nfrom small import soil\nfrom small.deep.well import water\n\n"
    "def f():\n    import small.late\n",
    "small/soil.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from small.types import T\n",
    "small/types.py": "T = int\n",
    "small/late.py": "",
    "small/unused.py": "",
    "small/deep/__init__.py": "from . import pump\n",
    "small/deep/well.py": "from ..soil import x\nwater = 1\n",
    "small/deep/pump.py": "from .gear import wheel\n",
    "small/deep/gear.py": "wheel = 1\n",
    "small/run.py": "import small.unused\n",
    "small/odd/lonely.py": "",
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    for path, text in FILES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def paths(root: Path, entry: str = "small.entry", **options: tuple[str, ...]) -> list[str]:
    return [file.path for file in closure(root, entry, **options)]


def test_everything_that_is_imported_and_nothing_else(small: Path) -> None:
    assert paths(small) == sorted(
        f"small/{name}.py"
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


def test_digests_are_of_the_bytes(small: Path) -> None:
    assert all(file.digest == Digest.of((small / file.path).read_bytes()) for file in closure(small, "small.entry"))


def test_one_character_in_a_file_of_the_closure_changes_it_and_elsewhere_does_not(small: Path) -> None:
    before = closure(small, "small.entry")
    (small / "small/unused.py").write_text("#")
    assert closure(small, "small.entry") == before
    (small / "small/deep/gear.py").write_text("wheel = 2\n")
    assert closure(small, "small.entry") != before


def test_always_and_exclude(small: Path) -> None:
    assert "small/unused.py" in paths(small, always=("small.unused",))
    excluded = paths(small, exclude=("small.deep", "small.late"))
    assert not any("deep" in path or "late" in path for path in excluded)
    assert "small/unused.py" not in paths(small, always=("small.run",), exclude=("small.run",))


def test_a_package_without_init_is_followed(small: Path) -> None:
    (small / "small/entry.py").write_text("from small.odd import lonely\n")
    assert "small/odd/lonely.py" in paths(small)


@pytest.mark.parametrize(
    "text",
    [
        "import importlib\nimportlib.import_module('small.late')",
        "from importlib import import_module",
        "from importlib import util",
        "import importlib.util",
        "import importlib.metadata\nimportlib.import_module('x')",
        "__import__('small.late')",
        "exec('import small.late')",
        "f = eval",
        "import runpy",
        "import builtins",
        "from small.deep import *",
        "from ...above import x",
        "def (",
        "x = 1\0",
    ],
)
def test_what_cannot_be_seen_beforehand_is_refused(small: Path, text: str) -> None:
    (small / "small/soil.py").write_text(text)
    with pytest.raises(RecipeRefused) as caught:
        closure(small, "small.entry")
    assert caught.value.where


@pytest.mark.parametrize(
    "text", ["model.eval()", "from importlib import metadata", "import importlib.metadata", "import re\nre.compile('')"]
)
def test_what_only_looks_like_it_is_taken(small: Path, text: str) -> None:
    (small / "small/late.py").write_text(text)
    assert "small/late.py" in paths(small)


def test_an_absent_entry_is_refused(small: Path) -> None:
    with pytest.raises(RecipeRefused, match="no such module"):
        closure(small, "small.nothing")


def test_a_dynamic_import_outside_the_closure_is_nobodys_business(small: Path) -> None:
    (small / "small/unused.py").write_text("exec('1')")
    assert paths(small)


def test_packages_below_src_are_the_repositorys_too(small: Path) -> None:
    (small / "src/other").mkdir(parents=True)
    (small / "src/other/tool.py").write_text("")
    (small / "small/soil.py").write_text("import other.tool\n")
    assert "src/other/tool.py" in paths(small)
