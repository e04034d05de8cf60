"""The plan of recipes/: pure operations below, recipe files above, one joint to the store."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from vpstore.code import closure

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "recipes").rglob("*.py"))
}
RECIPES = {
    name
    for name in MODULES
    if name.count(".") == 1 and (ROOT / f"recipes/params/{name.rpartition('.')[2]}.py").exists()
}
# What a room may import of the project; a room is a folder of recipes/, or a group of its files.
MAY = {
    "ops": {"ops", "errors"},
    "params": {"params", "model.config"},
    "data": {"data", "params", "errors", "tensors", "names", "recipe"},
    "model": {"model", "ops", "data", "params", "errors", "tensors", "names", "recipe", "checkpoint"},
    "megatron": {
        "megatron",
        "model",
        "errors",
        "tensors",
        "names",
        "recipe",
        "planned",
        "checkpoint",
        "train.megatron_arguments",
        "train.run_files",
    },
    "huggingface": {
        "huggingface",
        "model.config",
        "data.encodings",
        "errors",
        "tensors",
        "names",
        "recipe",
        "checkpoint",
    },
    "train": {
        "train",
        "model",
        "data",
        "params",
        "errors",
        "tensors",
        "names",
        "recipe",
        "checkpoint",
        "runtime",
        "ops",
    },
}


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(path.read_bytes())))


@cache
def imported(path: Path) -> set[str]:
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name.split(".")[0] in ("recipes", "vpstore")}


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 14


@pytest.mark.parametrize("name", sorted(MODULES))
def test_only_the_joint_knows_the_store(name: str) -> None:
    if name != "recipes.run":
        assert {i for i in imported(MODULES[name]) if i.startswith("vpstore")} <= {"vpstore.errors"}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_do_not_import_recipes_or_the_joint(name: str) -> None:
    above = {"recipes.run", "recipes.execute", "recipes.recompute", "recipes.job", "recipes.config", "recipes.launch"}
    assert not imported(MODULES[name]) & ((RECIPES | above) - {name})


@pytest.mark.parametrize("name", [n for n in sorted(MODULES) if n.count(".") > 1])
def test_rooms_import_only_what_lies_below(name: str) -> None:
    room = name.split(".")[1]
    for other in imported(MODULES[name]):
        short = other.removeprefix("recipes.").removeprefix("vpstore.")
        assert any(short == may or short.startswith(may + ".") for may in MAY[room]), f"{name} imports {other}"


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_key_covers_all_that_makes_bytes(recipe: str) -> None:
    """What is left out cannot change one: see the tests of what is held against the key."""
    from recipes.config import params_module
    from recipes.run import CODE_ALWAYS, CODE_EXCLUDE

    always = (*CODE_ALWAYS, params_module(recipe))
    files = {file.path for file in closure(ROOT, recipe, always=always, exclude=CODE_EXCLUDE)}
    assert {"recipes/tensors.py", "recipes/runtime.py", f"recipes/{recipe.rpartition('.')[2]}.py"} <= files
    assert {f"recipes/{name}.py" for name in ("execute", "launch", "outputs", "job", "params/base")} <= files
    outside = [f"recipes/{name}.py" for name in ("run", "loading", "config", "recompute", "preflight", "gpus")]
    assert not [f for f in files if f in outside or f.startswith("vpstore/")]


@pytest.mark.parametrize("name", sorted(n for n in MODULES if n.startswith("recipes.params.")))
def test_params_hold_values_and_compute_nothing(name: str) -> None:
    """A build key has their values, and a recipe must see these and no others."""
    for node in nodes(MODULES[name]):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            decorators = [ast.unparse(d) for d in getattr(node, "decorator_list", [])]
            assert any("validator" in d for d in decorators), f"{name}: {getattr(node, 'name', 'lambda')}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_the_device_is_chosen_and_not_detected(name: str) -> None:
    """A recipe that took what it found would give other bytes on another machine, under a record that says CPU."""
    asked = {"is_available", "device_count", "current_device", "is_built", "current_accelerator"}
    found = {node.attr for node in nodes(MODULES[name]) if isinstance(node, ast.Attribute)}
    assert name == "recipes.runtime" or not found & asked


def test_a_key_is_known_without_torch() -> None:
    code = "import sys, recipes.run, recipes.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
