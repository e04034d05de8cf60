"""One build as plain values, and the recipe's module as what the contract says it is.

Place in the path: config, recipe -> **job** -> execute, recompute. In every code closure, as all that carries out is.

Invariants: numerics are fixed before the module is imported, as importing it imports torch; a module that is no recipe
is refused before anything is computed; a recipe sees the very params that the build key has.

Example:
    >>> Job("recipes.expand_depth", params, threads, inputs, sources, scratch).recipe().plan(context)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from recipes import runtime
from recipes.loading import recipe_module, typed_params
from recipes.recipe import Context, InputArtifact, PlanRecipe, Progress, RunRecipe
from vpstore.errors import RecipeRefused

_OF_A_PLAN = ("plan", "intermediates", "check", "needs")


@dataclass(frozen=True)
class Job:
    """One build, as plain values that a worker process can be given."""

    entry: str
    params: Mapping[str, Any]
    threads: int
    inputs: Mapping[str, InputArtifact]
    sources: Mapping[str, Path]
    scratch: Path
    intermediates: Mapping[str, Path] = field(default_factory=dict)
    ranks: int = 1  # processes that share the rows of a training

    def context(self, progress: Progress) -> Context:
        """What the recipe sees.

        Raises:  UsageError: params that its class refuses; RecipeRefused: params that its class changed.
        """
        params = typed_params(self.entry, self.params)
        _refuse_other_params(self.entry, self.params, params.model_dump(mode="json"))
        return Context(params, self.inputs, self.sources, self.scratch, progress, self.intermediates)

    def recipe(self) -> PlanRecipe | RunRecipe:
        """The recipe's module, imported under fixed numerics.

        Raises:  RecipeRefused: it is no recipe.
        """
        runtime.fix_numerics(self.threads)
        module = recipe_module(self.entry)
        if module.__name__ != self.entry:
            raise _no_recipe(module, f"what was loaded for {self.entry}")
        return parsed_recipe(module)


def parsed_recipe(module: ModuleType) -> PlanRecipe | RunRecipe:
    """What a module offers under the names of the contract.

    Raises:  RecipeRefused: neither plan nor run, parts of a plan beside a run, or a name that is no function.
    """
    found: dict[str, Callable[..., Any]] = {}
    for name in ("run", *_OF_A_PLAN):
        value = getattr(module, name, None)
        if value is not None and not callable(value):
            raise _no_recipe(module, f"{name} = {value!r}")
        if value is not None:
            found[name] = value
    if "run" in found and len(found) == 1:
        return RunRecipe(**found)
    if "plan" in found and "run" not in found:
        return PlanRecipe(**found)
    raise _no_recipe(module, ", ".join(found) or "none of them")


def _refuse_other_params(entry: str, given: Mapping[str, Any], seen: Mapping[str, Any]) -> None:
    """What reads and checks params is in no key; so what comes of it must be what the key has."""
    for name, value in given.items():
        if json.dumps(value, sort_keys=True) != json.dumps(seen.get(name), sort_keys=True):
            raise RecipeRefused(
                "a recipe's params are not those of its build key",
                where=f"{entry}: {name}",
                expected=repr(value)[:200],
                found=repr(seen.get(name))[:200],
                next_step="let a Params class check values and change none",
            )


def _no_recipe(module: ModuleType, found: str) -> RecipeRefused:
    return RecipeRefused(
        "a module is no recipe",
        where=module.__name__,
        expected="run alone; or plan, with or without intermediates, check and needs",
        found=found,
        next_step="write it as recipes/recipe.py says, or name another module in objects.toml",
    )
