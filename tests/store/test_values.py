"""Digests, canonical JSON, refs and paths: parse and print are inverse, everything else is refused."""

from __future__ import annotations

import json
import math
import unicodedata
from typing import Any

import blake3
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpstore.errors import BadManifest, UsageError
from vpstore.schema.canonical import MAX_DEPTH, canonical_bytes, parse_canonical, parse_strict, readable_bytes
from vpstore.schema.digest import Digest
from vpstore.schema.paths import check_distinct, check_path
from vpstore.schema.ref import NAME, Ref, parse_ref

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
    ),
    max_leaves=20,
)
names = st.from_regex(NAME, fullmatch=True)


@given(st.binary(max_size=2000))
def test_a_digest_is_what_b3sum_prints(data: bytes) -> None:
    digest = Digest.of(data)
    assert digest == "blake3:" + blake3.blake3(data).hexdigest()
    assert Digest.parse(str(digest)) == digest
    assert Digest.from_hex(digest.hex) == digest
    assert digest.hex.startswith(digest.short)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "blake3:",
        "blake3:" + "A" * 64,
        "blake3:" + "a" * 63,
        "blake3:" + "a" * 65,
        "sha256:" + "a" * 64,
        "a" * 64,
        "blake3:" + "a" * 64 + "\n",
        5,
        None,
    ],
)
def test_what_is_no_digest_is_refused(text: object) -> None:
    with pytest.raises(BadManifest):
        Digest.parse(text)


@given(json_values)
def test_canonical_json_comes_back(value: Any) -> None:
    data = canonical_bytes(value)
    assert parse_canonical(data, where="test") == value
    assert canonical_bytes(parse_canonical(data, where="test")) == data
    assert parse_strict(readable_bytes(value), where="test") == value


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), st.integers(-9, 9), max_size=8), st.randoms())
def test_the_order_of_keys_does_not_matter(value: dict[str, int], random: Any) -> None:
    items = list(value.items())
    random.shuffle(items)
    assert canonical_bytes(dict(items)) == canonical_bytes(value)


def test_the_example_of_the_rfc() -> None:
    value = {
        "numbers": [333333333.33333329, 1e30, 4.50, 2e-3, 0.000000000000000000000000001],
        "string": '\u20ac$\u000f\nA\'B"\\\\"/',
        "literals": [None, True, False],
    }
    expected = (
        '{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],'
        '"string":"€$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}'
    )
    assert canonical_bytes(value) == expected.encode()


@pytest.mark.parametrize(
    "text",
    [
        '{"a":1,"a":2}',
        '{"a": 1}',
        '{"b":1,"a":2}',
        "[1.0]",
        "[1e2]",
        "[-0]",
        "[01]",
        "NaN",
        "[Infinity]",
        "1e999",
        "",
        '"\\ud800"',
        '"\\u0041"',
        "[1,]",
        "\ufeff{}",
        " {}",
        "{}\n",
        "[" * 100_000,
        "[" * 80 + "]" * 80,
        "9" * 5000,
        '{"a":{"b":1,"b":1}}',
    ],
)
def test_what_is_not_canonical_is_refused(text: str) -> None:
    with pytest.raises(BadManifest):
        parse_canonical(text.encode("utf-8", "surrogatepass"), where="test")


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        value = parse_canonical(data, where="test")
    except BadManifest:
        return
    assert canonical_bytes(value) == data


@pytest.mark.parametrize("value", [math.nan, math.inf, 2**53, "\ud800", {"\ud800": 1}, {1: 2}, object(), {1, 2}])
def test_what_has_no_json_form_is_refused(value: Any) -> None:
    with pytest.raises(BadManifest):
        canonical_bytes(value)


def test_depth_is_bounded() -> None:
    value: Any = 1
    for _ in range(MAX_DEPTH):
        value = [value]
    assert parse_canonical(canonical_bytes(value), where="test") == value
    with pytest.raises(BadManifest, match="deep"):
        canonical_bytes([value])


@given(st.floats(2.0**53, 1e21, exclude_max=True))
def test_large_floats_keep_their_canonical_form(value: float) -> None:
    assert parse_canonical(canonical_bytes([value]), where="test") == [value]


@given(names, st.none() | names, st.none() | names)
def test_refs_come_back(name: str, mode: str | None, stage: str | None) -> None:
    ref = Ref(name, mode, stage)
    assert parse_ref(str(ref)) == ref


@given(names, st.from_regex("[0-9a-f]{6,64}", fullmatch=True))
def test_digest_refs_come_back(name: str, prefix: str) -> None:
    assert parse_ref(f"{name}#{prefix}") == Ref(name, prefix=prefix)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "@",
        "a@",
        "@b",
        "a b",
        "a/b",
        "../a",
        "a.b.c",
        "a@b@c",
        "a#xyz123",
        "a#12345",
        "a#" + "0" * 65,
        "-a",
        "a\n",
        "ä",
    ],
)
def test_what_is_no_ref_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_ref(text)


@pytest.mark.parametrize("path", ["a", "a/b.json", "reports/metrics.json", "ü/é", ".hidden", "a..b", "a b", "x" * 255])
def test_ordinary_paths_are_taken(path: str) -> None:
    assert check_path(path, where="test") == path


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/a",
        "a/",
        "a//b",
        ".",
        "..",
        "../a",
        "a/../b",
        "a/./b",
        "a\\b",
        "C:x",
        "a\0b",
        "a\nb",
        "a\x7f",
        "\ud800",
        unicodedata.normalize("NFD", "é"),
        "x" * 256,
        "/".join(["x" * 200] * 6),
        "a ",
        " a",
        "a.",
        "a/b./c",
        5,
        None,
    ],
)
def test_paths_that_mean_different_things_in_different_places_are_refused(path: object) -> None:
    with pytest.raises(BadManifest):
        check_path(path, where="test")


@given(st.text(max_size=40))
def test_a_path_that_is_taken_stays_below_its_root(path: str) -> None:
    try:
        check_path(path, where="test")
    except BadManifest:
        return
    assert not path.startswith("/")
    assert ".." not in path.split("/")
    assert "\0" not in path


@pytest.mark.parametrize(
    "pair", [("a", "A"), ("straße", "STRASSE"), ("a", "a"), ("a", "a/b"), ("A/x", "a"), ("ﬁ", "fi")]
)
def test_colliding_paths_are_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(BadManifest):
        check_distinct(pair, where="test")


def test_distinct_paths_are_taken() -> None:
    check_distinct(["a/b", "a/c", "ab", "a-b"], where="test")


def test_readable_json_is_sorted() -> None:
    assert readable_bytes({"b": 1, "a": [1]}) == (json.dumps({"a": [1], "b": 1}, indent=2) + "\n").encode()
