r"""A run's configuration as files: TOML, and Megatron's command-line arguments; both with their way back.

Place in the path: stage1_handoff -> **run_files** -> the trainer of Stage 1. Pure.

Invariants: `tomllib.loads(to_toml(x)) == x`; `parse_arguments(write_arguments(x)) == x`; sorted nowhere: the order of
the document is the order of the file.

Example:
    >>> to_toml({"a": 1, "b": {"c": [0.5, "x"]}})
    'a = 1\n\n[b]\nc = [0.5, "x"]\n'
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vpstore.errors import RecipeRefused

Arguments = Mapping[str, str | None]  # flag without dashes -> value; None for a switch


def to_toml(document: Mapping[str, Any]) -> str:
    """A TOML document of tables, arrays of tables and plain values.

    Raises:  RecipeRefused: a value that TOML has no form for.
    """
    return "\n".join(_table((), document)).lstrip("\n") + "\n"


def _table(path: tuple[str, ...], table: Mapping[str, Any]) -> Iterator[str]:
    """Plain values first, since what follows a header belongs to it."""
    tables = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    lists = {key: value for key, value in table.items() if _is_tables(value)}
    for key, value in table.items():
        if key not in tables and key not in lists:
            yield f"{_key(key)} = {_value(value, '.'.join((*path, key)))}"
    for key, inner in tables.items():
        yield from ("", f"[{'.'.join(_key(part) for part in (*path, key))}]")
        yield from _table((*path, key), inner)
    for key, rows in lists.items():
        for row in rows:
            yield from ("", f"[[{'.'.join(_key(part) for part in (*path, key))}]]")
            yield from _table((*path, key), row)


def _is_tables(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _key(key: str) -> str:
    is_bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if is_bare else _text(key)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any, where: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(inner, where) for inner in value) + "]"
    raise RecipeRefused(
        "a value has no form in TOML",
        where=where,
        expected="text, a finite number, true or false, a list",
        found=repr(value)[:80],
        next_step="mend the recipe that builds the document",
    )


def write_arguments(arguments: Arguments, *, comments: Sequence[str] = ()) -> str:
    """One argument a line, as a shell reads it; comments come first, behind `#`."""
    lines = [f"# {comment}" for comment in comments]
    lines += [f"--{flag}" if value is None else f"--{flag} {shlex.quote(value)}" for flag, value in arguments.items()]
    return "\n".join(lines) + "\n"


def parse_arguments(text: str) -> dict[str, str | None]:
    """The inverse of `write_arguments`, comments left out.

    Raises:  RecipeRefused: a line that is no argument, or a flag that comes twice.
    """
    found: dict[str, str | None] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = shlex.split(line, comments=True)
        if not words:
            continue
        flag = words[0].removeprefix("--")
        if not words[0].startswith("--") or len(words) > 2 or flag in found:
            raise RecipeRefused(
                "a line is not one argument",
                where=f"line {number}",
                expected="--flag or --flag value, each flag once",
                found=line[:80],
                next_step="build stage1 again",
            )
        found[flag] = words[1] if len(words) == 2 else None
    return found
