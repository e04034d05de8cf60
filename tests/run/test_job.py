"""A recipe's module is a plan or a run, and is refused before anything is computed if it is neither."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from recipes.job import parsed_recipe
from recipes.recipe import PlanRecipe, RunRecipe
from vpstore.errors import RecipeRefused

ROOT = Path(__file__).resolve().parents[2]
RUNS = {"embedded_donor", "evaluate", "heal", "healing_text", "synth_kd", "wake_up"}
PLANS = {path.stem for path in (ROOT / "recipes/params").glob("*.py") if (ROOT / "recipes" / path.name).exists()} - RUNS


def module(**names: object) -> ModuleType:
    made = ModuleType("made_up")
    vars(made).update(names)
    return made


@pytest.mark.parametrize("name", sorted((PLANS | RUNS) - {"__init__"}))
def test_every_recipe_is_one_of_the_two_kinds(name: str) -> None:
    kind = RunRecipe if name in RUNS else PlanRecipe
    assert isinstance(parsed_recipe(import_module(f"recipes.{name}")), kind)


def test_a_plan_without_intermediates_has_none() -> None:
    recipe = parsed_recipe(module(plan=print))
    assert isinstance(recipe, PlanRecipe)
    assert (recipe.intermediates(None), recipe.check) == ((), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ({}, "none of them"),
        ({"check": print}, "check"),
        ({"plan": print, "run": print}, "run, plan"),
        ({"run": print, "intermediates": print}, "run, intermediates"),
        ({"run": print, "check": print}, "run, check"),
        ({"plan": 3}, "plan = 3"),
    ],
)
def test_what_is_neither_is_refused(names: dict[str, object], found: str) -> None:
    with pytest.raises(RecipeRefused, match="no recipe") as caught:
        parsed_recipe(module(**names))
    assert (caught.value.where, caught.value.found) == ("made_up", found)
