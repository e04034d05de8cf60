"""Configuration: objects.toml, one TOML an object and mode, one TOML a profile -> the typed Params of a stage.

Place in the path: **config** -> recipe. Torch-free, so that a build key is known in milliseconds.

Invariants: a key lives in the object's TOML or in the profile's, never in both, so that an override on the command line
always acts; an unknown key is refused; the values that come out are all there is in the key, whatever the comments or
the order of the files.

Where a stage's params come from, object TOML and profile alike:
    the table named like the stage             fields of the recipe's Params (or [default], for stages that are alike)
    the tables [model] and [donor]             the Params fields of those names, if the recipe has them

Example:
    >>> stage_params(Path("."), profile="tiny", place=Place("vpDense", "expand", None, "recipes.expand_depth", (…,)))
"""

from __future__ import annotations

import importlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from recipes.params.base import ParamsBase
from vpstore.errors import UsageError

SHARED_TABLES = ("model", "donor")
DEFAULT_TABLE = "default"


@dataclass(frozen=True)
class Place:
    """Which stage is asked for, and the files that configure it."""

    object: str
    stage: str
    mode: str | None
    recipe: str  # module, recipes.<name>
    config: tuple[str, ...]  # paths of TOML files, relative to the checkout

    @property
    def profile_path(self) -> tuple[str, ...]:
        """Keys that lead to this object's tables in a profile."""
        return ("params", self.object) if self.mode is None else ("params", self.object, self.mode)


def read_toml(path: Path) -> dict[str, Any]:
    """The parsed file.

    Raises:  UsageError: missing or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError("a configuration file is missing", where=str(path), next_step="git checkout it") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            "a configuration file is not TOML", where=str(path), found=str(error), next_step="mend it at that line"
        ) from error


def merge(base: Mapping[str, Any], other: Mapping[str, Any], *, where: str, path: str = "") -> dict[str, Any]:
    """Both tables as one; a key with a value on both sides is refused.

    Raises:  UsageError: the key and the files it stands in.
    """
    merged = dict(base)
    for key, value in other.items():
        here = f"{path}.{key}" if path else key
        if key not in merged:
            merged[key] = value
        elif isinstance(merged[key], Mapping) and isinstance(value, Mapping):
            merged[key] = merge(merged[key], value, where=where, path=here)
        else:
            raise UsageError(
                "a key stands in the object's configuration and in the profile's",
                where=f"{where}: {here}",
                expected="one of the two",
                found=f"{merged[key]!r} and {value!r}",
                next_step="delete one, so that an override always acts",
            )
    return merged


def params_module(recipe: str) -> str:
    """The module of a recipe's Params class: recipes.x -> recipes.params.x."""
    return f"recipes.params.{recipe.rpartition('.')[2]}"


def params_model(recipe: str) -> type[ParamsBase]:
    """The Params class of a recipe module."""
    name = recipe.rpartition(".")[2]
    try:
        found: type[ParamsBase] = importlib.import_module(params_module(recipe)).Params
    except (ModuleNotFoundError, AttributeError) as error:
        raise UsageError(
            "a recipe has no typed params",
            where=recipe,
            expected=f"class Params in recipes/params/{name}.py",
            next_step="write it, or mend the recipe's name in objects.toml",
        ) from error
    return found


def stage_params(root: Path, *, profile: dict[str, Any], place: Place) -> ParamsBase:
    """The typed params of one stage.

    Raises:  UsageError: unknown or missing keys, wrong types, a key on both sides; each with its path.
    """
    own: dict[str, Any] = {}
    for name in place.config:
        own = merge(own, read_toml(root / name), where=name)
    table = descend(profile, place.profile_path)
    label = f"{', '.join(place.config)} and the profile"
    both = merge(own, table, where=label)
    model = params_model(place.recipe)
    values = dict(both.get(place.stage, both.get(DEFAULT_TABLE, {})))
    for shared in SHARED_TABLES:
        if shared in model.model_fields:
            values = merge(values, {shared: both.get(shared, {})}, where=label)
    return validated(model, values, where=f"{label}: [{place.stage}]")


def descend(table: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any]:
    """The table at the end of a path of keys; empty if there is none."""
    for key in path:
        table = table.get(key, {})
    return table


def tables_of(table: Mapping[str, Any], place: Place) -> list[str]:
    """Which tables of a configuration the stage's params come from."""
    own = place.stage if place.stage in table else DEFAULT_TABLE
    return [name for name in (own, *SHARED_TABLES) if name in table]


def validated(model: type[ParamsBase], values: Mapping[str, Any], *, where: str) -> ParamsBase:
    """Typed values, with pydantic's complaints in the house's form.

    Raises:  UsageError: the first fault in full, the others counted.
    """
    try:
        # JSON mode: arrays become tuples and integers become floats where the field says so, and nothing else is bent.
        return model.model_validate_json(json.dumps(values, allow_nan=False))
    except (TypeError, ValueError) as error:
        if isinstance(error, ValidationError):
            raise _refused(error, where) from error
        raise UsageError(
            "a configuration value has no place in a build key",
            where=where,
            expected="finite numbers, text, true, false, arrays and tables",
            found=str(error),
            next_step="write a date as text, and leave out inf and nan",
        ) from error


def _refused(error: ValidationError, where: str) -> UsageError:
    # A misspelt key makes two complaints, unknown and missing; the unknown one says what to mend.
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in first["loc"]) or "(the table itself)"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return UsageError(
        "a configuration value is refused",
        where=f"{where} {key}",
        expected=first["msg"] + more,
        found=repr(first.get("input"))[:120],
        next_step="mend the TOML; recipes/params/ lists every key with its type",
    )


def unknown_tables(profile: Mapping[str, Any], known: Mapping[str, set[str]]) -> list[str]:
    """Tables of a profile's [params] that configure nothing, as dotted paths.

    Args:    known: for each object the tables that may stand under it: stages, and for objects with modes
                    `<mode>.<stage>`; the shared tables likewise.
    """
    faults = []
    for name, tables in profile.get("params", {}).items():
        for key, value in tables.items():
            inner = {f"{key}.{part}" for part in value} if isinstance(value, Mapping) else set()
            if key not in known.get(name, set()) and not (inner and inner <= known.get(name, set())):
                faults.append(f"params.{name}.{key}")
    return faults
