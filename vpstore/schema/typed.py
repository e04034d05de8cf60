"""Typed values: params as JSON that tells a float from an integer, so that two values never share a document.

Place in the path: config -> **here** -> build record. Canonical JSON knows one kind of number: `3` and `3.0` are one
there, `-0.0` is `0`, and integers beyond 2**53 are none. A document therefore writes a float as `{"$float": "3.0"}`
and a large integer as `{"$int": "9007199254740993"}`.
Invariants: `untyped(typed(value))` is the value, types and signs included; two values that differ have two documents;
what JSON cannot say is refused by its dotted name.

Example:
    >>> typed({"rate": 1.0, "steps": 3})
    {'rate': {'$float': '1.0'}, 'steps': 3}
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final

from vpstore.errors import BadManifest, UsageError
from vpstore.schema.canonical import canonical_bytes

_FLOAT, _INT = "$float", "$int"
_EXACT: Final = 2**53 - 1
_MAX_DEPTH: Final = 48  # a document has some levels around it
_DIGITS: Final = re.compile(r"-?[1-9][0-9]*")


def plain(value: Any, *, where: str) -> Any:
    """A value as a recipe gets it, whether it is built or built again: dicts, lists, str, int, float, bool, None.

    Args:    where: what it is called, for errors. Tuples become lists; subclasses of the types above become these; keys
             are in the order of canonical JSON.
    Raises:  UsageError: NaN, infinity, a date, a set or any other type; a key that is no text or begins with `$`;
             nested too deeply.
    """
    return _plain(value, where, 0)


def _plain(value: Any, where: str, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise _refusal(where, f"more than {_MAX_DEPTH} levels", "a value is nested too deeply")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _refusal(where, repr(float(value)))
        return float(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key.startswith("$"):
                raise _refusal(where, f"the key {key!r}"[:120], "a key is no text, or begins with $")
        return {key: _plain(value[key], f"{where}.{key}", depth + 1) for key in _in_order(value, where)}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, f"{where}[{number}]", depth + 1) for number, inner in enumerate(value)]
    raise _refusal(where, f"{type(value).__name__}: {value!r}"[:120])


def _in_order(table: Mapping[str, Any], where: str) -> list[str]:
    """The keys as canonical JSON sorts them: a recipe meets them in one order, whoever wrote them down."""
    return sorted((_text(key, where) for key in table), key=lambda key: key.encode("utf-16-be"))


def _text(value: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _refusal(where, "half of a character") from None
    return str(value)


def _refusal(where: str, found: str, what: str = "a value cannot be in a build key") -> UsageError:
    return UsageError(
        what,
        where=where,
        expected="finite numbers, text, true, false, null, lists, and tables whose keys are text",
        found=found,
        next_step="write it as one of these; a date as text, a set as a sorted list",
    )


def typed(value: Any) -> Any:
    """The document of a plain value."""
    if isinstance(value, float):
        return {_FLOAT: repr(value)}
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _EXACT:
        return {_INT: str(value)}
    if isinstance(value, dict):
        return {key: typed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [typed(inner) for inner in value]
    return value


def is_other(before: Any, after: Any) -> bool:
    """Whether two plain values are two to a build key; `==` takes 1, 1.0 and True for one."""
    return canonical_bytes(typed(before)) != canonical_bytes(typed(after))


def untyped(document: Any, *, where: str) -> Any:
    """The value of a document.

    Raises:  BadManifest: a number that `typed` would have written otherwise, or an unknown `$` key.
    """
    if isinstance(document, dict):
        if any(key.startswith("$") for key in document):
            return _number(document, where)
        return {key: untyped(inner, where=f"{where}.{key}") for key, inner in document.items()}
    if isinstance(document, list):
        return [untyped(inner, where=f"{where}[{number}]") for number, inner in enumerate(document)]
    if isinstance(document, float):
        raise BadManifest("a float does not stand as itself", where=where, expected="$float", found=repr(document))
    return document


def _number(document: dict[str, Any], where: str) -> int | float:
    found = BadManifest("not a number of a document", where=where, expected="$float or $int", found=repr(document)[:80])
    if len(document) != 1:
        raise found
    ((kind, text),) = document.items()
    if not isinstance(text, str):
        raise found
    try:
        value = float(text) if kind == _FLOAT else int(text) if kind == _INT and _DIGITS.fullmatch(text) else None
    except ValueError:
        value = None
    if value is None or typed(value) != document or not math.isfinite(value):
        raise found
    return value
