"""Finds what a build names: the module of a recipe, and its typed params.

Place in the path: **here** -> job. In no code closure, as imports by name cannot be followed. The module's name is in
the key, and `job` holds the params that come from here against the key's own values.

Example:
    >>> typed_params("recipes.heal", values).train.steps
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from recipes import config
from recipes.params.base import ParamsBase


def recipe_module(entry: str) -> ModuleType:
    """The module of that name; importing it may import torch."""
    return importlib.import_module(entry)


def typed_params(entry: str, values: Mapping[str, Any]) -> ParamsBase:
    """The params of a recipe.

    Raises:  UsageError: not what its Params class wants.
    """
    return config.validated(config.params_model(entry), values, where=entry)
