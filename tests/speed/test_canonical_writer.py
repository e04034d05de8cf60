"""The quick writer of canonical JSON against the reference implementation: the same bytes, the same refusals."""

from __future__ import annotations

import math
import random
import struct
from typing import Any

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from vpstore.errors import BadManifest
from vpstore.schema.canonical import canonical_bytes
from vpstore.schema.digest import Digest

floats = st.floats() | st.tuples(st.floats(1, 10), st.integers(-30, 30)).map(lambda pair: pair[0] * 10.0 ** pair[1])
keys = st.text(st.characters()) | st.text("ab\U0001f600\ue000é", max_size=3)
leaves = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | floats | st.text(st.characters())
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
)


def reference(value: Any) -> bytes | None:
    try:
        return rfc8785.dumps(value)
    except (rfc8785.CanonicalizationError, UnicodeError):
        return None


def ours(value: Any) -> bytes | None:
    try:
        return canonical_bytes(value)
    except BadManifest:
        return None


@given(values)
@settings(max_examples=400)
def test_any_value(value: Any) -> None:
    assert ours(value) == reference(value)


def test_many_floats() -> None:
    source = random.Random(0)
    for _ in range(20_000):
        (value,) = struct.unpack("<d", source.randbytes(8))
        assert ours(value) == reference(value), value
    for power in range(-30, 30):
        for digits in ("1", "1.5", "9.999999999999999", "1.2345678901234567"):
            value = float(f"{digits}e{power}")
            assert ours([-value]) == reference([-value]), value


@pytest.mark.parametrize(
    "value",
    [
        {"b": 1, "a": (1, 2)},
        {"é": 1, "z": 2},
        {"\U0001f600": 1, "\ufb33": 2},  # UTF-16 sorts them the other way round than code points do
        Digest.of(b""),
        {1: 2},
        {None: 1},
        {"a": {1, 2}},
        b"bytes",
        "\ud800",
        {"\ud800": 1},
        2**53,
        -(2**53) + 1,
        math.nan,
        [math.inf],
        1e21,
        1e-7,
        -0.0,
        5e-324,
        '\x00\x1f\x7f\u2028\\"/',
    ],
)
def test_corners(value: Any) -> None:
    assert ours(value) == reference(value)
