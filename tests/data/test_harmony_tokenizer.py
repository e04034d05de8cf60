from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.data.bpe import load_ranks
from recipes.data.harmony import EOD, HarmonyTokenizer, has_long_blanks
from vpstore.errors import RecipeRefused

BLANKS = " \t\x0b\u00a0\u2003\u3000\u2028\x85"
AROUND = st.text(alphabet=" \t\n\r\u00a0\u3000\u2028\x0b\x85\x1cab1!/'\u0301é中_", max_size=24)


@pytest.fixture(scope="module")
def eager(assets: Path) -> HarmonyTokenizer:
    """Cuts every run of two blanks, where the ordinary one cuts none of the tests' runs."""
    return HarmonyTokenizer(load_ranks(assets / "o200k_base.tiktoken"), long_run=2)


def test_special_ids_decode_to_their_names(harmony: HarmonyTokenizer) -> None:
    assert harmony.decode([200006, EOD]) == "<|start|><|endoftext|>"
    assert harmony.n_vocab == 201088
    assert {harmony.token_bytes(number) for number in harmony.special.values()} == {
        name.encode() for name in harmony.special
    }


@given(st.lists(st.integers(0, 199997), max_size=20))
def test_bytes_of_any_ids_are_exact(harmony: HarmonyTokenizer, ids: list[int]) -> None:
    data = harmony.decode_bytes(ids)
    assert data == b"".join(harmony.token_bytes(number) for number in ids)
    assert harmony.decode(ids) == data.decode("utf-8", errors="replace")


@pytest.mark.parametrize("number", [-1, 201088, 10**9])
def test_an_id_outside_the_vocabulary_is_refused(harmony: HarmonyTokenizer, number: int) -> None:
    with pytest.raises(RecipeRefused, match="outside the vocabulary"):
        harmony.decode([number])


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "x" * 100 + "\udc80"])
def test_a_lone_surrogate_is_refused(harmony: HarmonyTokenizer, text: str) -> None:
    with pytest.raises(RecipeRefused, match="surrogate"):
        harmony.encode(text)


@given(st.lists(st.tuples(AROUND, st.text(alphabet=BLANKS, min_size=2, max_size=12)), max_size=5), AROUND)
@settings(max_examples=400, deadline=None)
def test_cutting_long_blanks_changes_nothing(
    harmony: HarmonyTokenizer, eager: HarmonyTokenizer, parts: list[tuple[str, str]], end: str
) -> None:
    text = "".join(before + run for before, run in parts) + end
    assert eager.encode(text) == harmony.encode(text)


@pytest.mark.parametrize(("before", "after"), [("", ""), ("a", "!"), ("!\n", "a"), ("\n", "\n"), ("1\r\n", " x")])
def test_more_than_a_million_blanks_are_encoded(harmony: HarmonyTokenizer, before: str, after: str) -> None:
    text = before + " " * 1_100_000 + after
    assert has_long_blanks(text)
    assert harmony.decode(harmony.encode(text)) == text


def test_runs_just_below_the_limit_take_linear_time(harmony: HarmonyTokenizer) -> None:
    text = (" " * 99_999 + "a") * 10
    assert not has_long_blanks(text)
    text += " " * 400_000 + "\n"
    assert harmony.decode(harmony.encode(text)) == text


def test_the_encoder_alone_fails_on_them(harmony: HarmonyTokenizer) -> None:
    with pytest.raises(BaseException, match="StackOverflow"):
        harmony._encoding.encode_ordinary(" " * 1_100_000)


@pytest.mark.parametrize("damage", ["no file", "one bit", "cut", "the donor's"])
def test_another_rank_file_is_refused_and_told_what_to_do(tmp_path: Path, assets: Path, damage: str) -> None:
    data = bytearray((assets / "o200k_base.tiktoken").read_bytes())
    if damage == "one bit":
        data[1000] ^= 1
    elif damage == "cut":
        del data[-1:]  # the last line break: the same ranks, and yet not the published file
    elif damage == "the donor's":
        data = bytearray((assets / "qwen.tiktoken").read_bytes())
    if damage != "no file":
        (tmp_path / "o200k_base.tiktoken").write_bytes(data)
    with pytest.raises(RecipeRefused, match="not the published one") as caught:
        HarmonyTokenizer.from_directory(tmp_path)
    assert "446a9538" in str(caught.value.expected)
    assert str(caught.value.found) == ("no such file" if damage == "no file" else sha256(data).hexdigest())
    assert "put the published o200k_base.tiktoken there" in str(caught.value.next_step)
