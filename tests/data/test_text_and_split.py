from __future__ import annotations

import json
from collections import Counter
from hashlib import blake2b, sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.data.split import is_held_out
from recipes.data.text import RowFile, clean_text
from vpstore.errors import RecipeRefused

GOLDEN_SHA = [7, 19, 20, 21, 49, 50, 52, 59]
GOLDEN_BLAKE = [17, 43, 48, 51]


def test_the_split_is_the_stated_rule() -> None:
    for number in range(500):
        name = f"doc-{number}"
        first = int.from_bytes(sha256(name.encode()).digest()[:8], "big")
        assert is_held_out(name, fraction=0.1, digest="sha256") == (first < 0.1 * 2**64)
        other = int.from_bytes(blake2b(name.encode()).digest()[:8], "big")
        assert is_held_out(name, fraction=0.25, digest="blake2b") == (other < 2**62)


def test_the_split_is_the_same_for_ever() -> None:
    held = [number for number in range(60) if is_held_out(f"doc-{number}", fraction=0.1, digest="sha256")]
    assert held == GOLDEN_SHA
    held = [number for number in range(60) if is_held_out(f"row-{number}", fraction=0.1, digest="blake2b")]
    assert held == GOLDEN_BLAKE


@given(st.text(max_size=20).filter(lambda text: text.isprintable()), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_only_adds(name: str, one: float, other: float) -> None:
    small, large = sorted((one, other))
    if is_held_out(name, fraction=small, digest="sha256"):
        assert is_held_out(name, fraction=large, digest="sha256")
    assert is_held_out(name, fraction=1.0, digest="sha256")
    assert not is_held_out(name, fraction=0.0, digest="sha256")


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(RecipeRefused, match="out of range"):
        is_held_out("x", fraction=fraction, digest="sha256")


def test_rows_are_found_again_by_offset(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    values = [{"id": f"{n}", "text": "é" * n} for n in range(20)]
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
    with RowFile(path, required=("id", "text")) as rows:
        offsets = [offset for offset, _ in rows.rows()]
        assert [rows.row_at(offset) for offset in reversed(offsets)] == values[::-1]
        assert [row for _, row in rows.rows()] == values


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b'{"id": "a"}', "no such key"),
        (b'{"id": 3, "text": "x"}', "int"),
        (b'["id"]', "list"),
        (b'{"id": "a", "text": "x"', "line 2"),
        (b"\xff", "line 2"),
        (b"", "line 2"),
    ],
)
def test_a_malformed_row_is_refused_with_its_line(tmp_path: Path, line: bytes, found: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "a", "text": "x"}\n' + line + b"\n")
    with RowFile(path, required=("id", "text")) as rows, pytest.raises(RecipeRefused, match="malformed") as caught:
        list(rows.rows())
    assert found in str(caught.value)
    assert "line 2" in caught.value.where


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeRefused, match="cannot be read"):
        RowFile(tmp_path / "none.jsonl", required=())


@pytest.mark.parametrize(
    ("text", "reason"), [("\ud800", "surrogate"), ("", "empty"), (" \n\u3000", "empty"), ("a\0b", "nul")]
)
def test_what_is_dropped_is_counted(text: str, reason: str) -> None:
    drops: Counter[str] = Counter()
    assert clean_text(text, nul_policy="drop", drops=drops) is None
    assert drops == {reason: 1}


def test_nul_policies() -> None:
    drops: Counter[str] = Counter()
    assert clean_text("a\0b\0", nul_policy="remove", drops=drops) == "ab"
    assert drops == {"nul_characters_removed": 2}
    assert clean_text("ab", nul_policy="refuse", drops=drops) == "ab"
    with pytest.raises(RecipeRefused, match="malformed"):
        clean_text("a\0b", nul_policy="refuse", drops=drops)
