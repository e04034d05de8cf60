"""Canonical JSON (RFC 8785): one value, one sequence of bytes.

Place in the path: under every document that has a digest. `canonical_bytes` writes, `parse_canonical` reads back only
what `canonical_bytes` could have written; `parse_strict` reads documents that people may lay out as they like.
Invariants: duplicate keys, NaN, infinities, lone surrogates, too deep or too large documents are refused everywhere.

Example:
    >>> canonical_bytes({"b": 1.0, "a": []})
    b'{"a":[],"b":1}'
"""

from __future__ import annotations

import json
import re
from typing import Any, Final, NoReturn

from vpstore.errors import BadManifest

MAX_BYTES: Final = 64 << 20  # a manifest of 100,000 files is about 30 MB
MAX_DEPTH: Final = 64
_MAX_EXACT: Final = 2**53 - 1
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")
_PLAIN: Final = json.JSONEncoder(
    ensure_ascii=False, check_circular=False, allow_nan=False, sort_keys=True, separators=(",", ":")
)


def canonical_bytes(value: Any, *, where: str = "") -> bytes:
    """The RFC 8785 bytes of a JSON value.

    Raises:  BadManifest: the value has no JSON form (NaN, an integer beyond 2**53 - 1, a lone surrogate, a foreign
             type) or is nested deeper than MAX_DEPTH.
    """
    _check_depth(value, where)
    try:
        return _text(value).encode("utf-8")
    except UnicodeError as error:
        raise BadManifest("a value has no canonical JSON form", where=where, found=str(error)) from error
    except TypeError:  # not a JSON value: the reference implementation says why
        import rfc8785
    try:
        return rfc8785.dumps(value)
    except (rfc8785.CanonicalizationError, UnicodeError) as error:
        raise BadManifest("a value has no canonical JSON form", where=where, found=str(error)) from error


def parse_canonical(data: bytes, *, where: str) -> Any:
    """Read a document that must be canonical.

    Raises:  BadManifest: as for `parse_strict`, or the bytes are not the canonical ones of their own value.
    """
    value = parse_strict(data, where=where)
    if canonical_bytes(value, where=where) != data:
        raise BadManifest("a document is not in canonical form", where=where, expected="RFC 8785 bytes")
    return value


def parse_strict(data: bytes, *, where: str, limit: int = MAX_BYTES) -> Any:
    """Read JSON of any layout, strictly.

    Args:    data: UTF-8 without a byte order mark; where: the place, for errors; limit: in bytes.
    Returns: dicts, lists, str, int, float, bool, None. Integers beyond 2**53 - 1 are read as floats, as RFC 8785 prints
             large floats without an exponent.
    Raises:  BadManifest: not JSON, a duplicate key, NaN, larger than the limit, deeper than MAX_DEPTH.
    """
    if len(data) > limit:
        raise BadManifest(
            "a document is too large", where=where, expected=f"at most {limit} bytes", found=f"{len(data)} bytes"
        )
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_pairs,
            parse_constant=_refuse_constant,
            parse_int=_integer,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise BadManifest("a document is not strict JSON", where=where, found=str(error)[:200]) from error
    _check_depth(value, where)
    if _SURROGATE.search(data) and _has_lone_surrogate(value):
        raise BadManifest("a document has half of a character", where=where, expected="no lone surrogates")
    return value


def readable_bytes(value: Any) -> bytes:
    """JSON for people: sorted keys, two spaces, one newline at the end; the same value always gives the same bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"key {name[:200]!r} appears twice")
            seen.add(name)
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _integer(text: str) -> int | float:
    if len(text) <= 17 and abs(number := int(text)) <= _MAX_EXACT:
        return number
    return _finite(text)


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:40]} is beyond the range of a double")
    return number


def _has_lone_surrogate(value: Any) -> bool:
    """Escapes may write what UTF-8 cannot; such text could not be written again."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError:
                return True
        elif isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            waiting += item
    return False


def _check_depth(value: Any, where: str) -> None:
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise BadManifest("a document is nested too deeply", where=where, expected=f"at most {MAX_DEPTH} levels")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, (list, tuple)):
                below.extend(item)
        level, depth = below, depth + 1


def _text(value: Any) -> str:
    """RFC 8785, by the standard library's encoder wherever that writes the same.

    Raises:  TypeError: not a JSON value; UnicodeError: a lone surrogate in a key.
    """
    if _is_plain(value):
        return _PLAIN.encode(value)
    if type(value) is dict:
        if not all(type(key) is str for key in value):
            raise TypeError
        rows = sorted(value.items(), key=lambda row: row[0].encode("utf-16be"))
        return "{" + ",".join(f"{_PLAIN.encode(key)}:{_text(inner)}" for key, inner in rows) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_text, value)) + "]"
    if type(value) is float and value - value == 0:  # neither infinite nor NaN
        return _number(value)
    raise TypeError


def _is_plain(value: Any) -> bool:
    """Whether the standard library's encoder writes a value as RFC 8785 does: all but odd floats, integers and keys."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str) or item is None:
            continue
        if isinstance(item, int):
            if not -_MAX_EXACT <= item <= _MAX_EXACT:
                return False
        elif type(item) is dict:
            if not all(type(key) is str and key.isascii() for key in item):  # UTF-16 sorts others in another order
                return False
            waiting.extend(item.values())
        elif isinstance(item, (list, tuple)):
            waiting.extend(item)
        else:
            return False
    return True


def _number(value: float) -> str:
    """A finite float as ECMAScript prints it: the digits that Python prints, with other exponents."""
    if value <= 0:
        return "-" + _number(-value) if value else "0"
    digits, _, exponent = repr(value).partition("e")
    if not exponent:
        return digits.removesuffix(".0")
    power = int(exponent)
    if not -7 < power < 21:
        return f"{digits}e{power:+d}"
    digits = digits.replace(".", "")
    if power < 0:
        return "0." + digits.rjust(len(digits) - power - 1, "0")
    return digits.ljust(power + 1, "0")  # Python prints an exponent from 1e16 on, and never more than 17 digits
