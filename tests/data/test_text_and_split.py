from __future__ import annotations

from collections import Counter
from hashlib import blake2b, sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.data.split import is_held_out
from recipes.data.text import clean_text
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
