"""Mutations of documents: of their bytes, and of the values behind them."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from vpstore.errors import VpstoreError
from vpstore.schema.canonical import canonical_bytes

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 1.5, -0.0, 1e-7, 1e21, 1e308, 2**31, 2**53 - 1, 2**53, 2**63, 2**64, -(2**63),
    10**400, "", " ", ".", "..", "../x", "/etc/passwd", "a/../b", "a\\b", "C:\\x", "x\0y", "\x1b[31m", "\ud800",
    "\udfff\ud800", "e\u0301", "\u202egpj.exe", "\u2126", "\u0130", "con", "artifact.json", "provenance.json",
    "a" * 300,
    "a/" * 600, "blake3:", "0" * 64, "blake3:" + "0" * 64, "blake3:" + "A" * 64, "blake3:" + "0" * 63 + "\n", "1e400",
    "NaN", "F32", "F4", "I128", "@", "a@b", "x#abcdef",
    [], {}, [[]], [{}], [None], {"": None}, {"format": 1}, {"a": {"a": {"a": {}}}}, [0, 2**63], [-1, 0], [5, 1],
)  # fmt: skip
SCRAPS = (
    b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\\ud800", b"\\u0000",
    b"NaN", b"-0", b"1E5", b"1.0", b"1e999", b" ", b"\n", b"\r\n", b"true", b"null", b"9" * 400, b'"a":1,"a":1',
    b"blake3:", b"../", b"/", b"\xed\xa0\x80", b"\xc0\xaf", b"[" * 200, b'{"a":' * 200, b"x = " + b"[" * 3000,
    b"x = " + b"{a=" * 3000, b"x" + b".x" * 900 + b" = 1\n", b"[[x" + b".x" * 900 + b"]]\n", b"x = " + b"9" * 5000,
    b"x = 0000-00-00", b"x = 1979-05-27T07:32:00Z\n", b"x = inf\n",
)  # fmt: skip


def mutate(data: bytes, random: Random, *, is_json: bool) -> bytes:
    """A document that is almost the given one."""
    if is_json and random.random() < 0.6:
        return _mutate_value(data, random)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        data = _mutate_bytes(data, random)
    return data


def _mutate_bytes(data: bytes, random: Random) -> bytes:
    at, end = sorted((random.randint(0, len(data)), random.randint(0, len(data))))
    match random.randrange(8):
        case 0 if data:
            at = random.randrange(len(data))
            return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]
        case 1 if data:
            at = random.randrange(len(data))
            return data[:at] + bytes([random.randrange(256)]) + data[at + 1 :]
        case 2:
            return data[:at] + data[min(end, at + random.randrange(1, 9)) :]
        case 3:
            return data[:at] + random.choice(SCRAPS) + data[at:]
        case 4:
            return data[:at]
        case 5:
            return data[:end] + data[at:end] + data[end:]
        case 6:
            other = random.randint(0, len(data))
            return data[:other] + data[at : at + 8] + data[other + 8 :]
        case _:
            return data[:at] + random.choice(SCRAPS) + data[end:]


def _mutate_value(data: bytes, random: Random) -> bytes:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return _mutate_bytes(data, random)
    for _ in range(random.choice((1, 1, 2, 3))):
        value = _changed(value, random)
    return _written(value, random)


def _changed(value: Any, random: Random) -> Any:
    """One node replaced, removed, doubled or renamed."""
    nodes = _nodes(value)
    if not nodes:
        return random.choice(HOSTILE)
    holder, name = random.choice(nodes)
    match random.randrange(6):
        case 0:
            del holder[name]
        case 1 if isinstance(holder, list):
            holder.insert(name, holder[name])
        case 1:
            holder[str(random.choice(HOSTILE))] = holder.pop(name)
        case 2 if isinstance(holder, list):
            random.shuffle(holder)
        case 3:
            other, its = random.choice(nodes)
            if its in other if isinstance(other, dict) else its < len(other):
                holder[name] = json.loads(json.dumps(other[its]))
        case _:
            holder[name] = json.loads(json.dumps(random.choice(HOSTILE)))
    return value


def _nodes(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        item = waiting.pop()
        inner = (
            list(item.items()) if isinstance(item, dict) else list(enumerate(item)) if isinstance(item, list) else []
        )
        found += [(item, name) for name, _ in inner]
        waiting += [below for _, below in inner]
    return found


def _written(value: Any, random: Random) -> bytes:
    """Mostly canonical, so that what is behind the first test is reached."""
    if random.random() < 0.85:
        try:
            return canonical_bytes(value)
        except VpstoreError:
            pass
    layout = random.choice(({"indent": 2, "sort_keys": True}, {"separators": (",", ":"), "sort_keys": True}, {}))
    return json.dumps(value, ensure_ascii=random.random() < 0.5, **layout).encode("utf-8", "surrogatepass")
