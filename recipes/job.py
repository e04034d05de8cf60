"""One build as plain values, and the recipe's module as what the contract says it is.

Place in the path: config, recipe -> **job** -> execute, recompute. It decides no bytes and is in no code closure.

Invariants: numerics are fixed before the module is imported, as importing it imports torch; a module that is no recipe
is refused before anything is computed.

Example:
    >>> Job("recipes.expand_depth", params, threads, inputs, sources, scratch).recipe().plan(context)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from recipes import config, runtime
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
        """What the recipe sees."""
        model = config.params_model(self.entry)
        params = config.validated(model, self.params, where=self.entry)
        return Context(params, self.inputs, self.sources, self.scratch, progress, self.intermediates)

    def recipe(self) -> PlanRecipe | RunRecipe:
        """The recipe's module, imported under fixed numerics.

        Raises:  RecipeRefused: it is no recipe.
        """
        runtime.fix_numerics(self.threads)
        return parsed_recipe(importlib.import_module(self.entry))


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


def _no_recipe(module: ModuleType, found: str) -> RecipeRefused:
    return RecipeRefused(
        "a module is no recipe",
        where=module.__name__,
        expected="run alone; or plan, with or without intermediates, check and needs",
        found=found,
        next_step="write it as recipes/recipe.py says, or name another module in objects.toml",
    )
