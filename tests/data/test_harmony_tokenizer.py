from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai_harmony import load_harmony_encoding
from tiktoken_ext import openai_public

from recipes.data.bpe import load_ranks
from recipes.data.harmony import EOD, NUMERIC_GOLDENS, HarmonyTokenizer, has_long_blanks
from vpstore.errors import RecipeRefused

QWEN_COUNTS = (9, 10, 10, 10, 11)
BLANKS = " \t\x0b\u00a0\u2003\u3000\u2028\x85"
AROUND = st.text(alphabet=" \t\n\r\u00a0\u3000\u2028\x0b\x85\x1cab1!/'\u0301é中_", max_size=24)


@pytest.fixture(scope="module")
def eager(assets: Path) -> HarmonyTokenizer:
    """Cuts every run of two blanks, where the ordinary one cuts none of the tests' runs."""
    return HarmonyTokenizer(load_ranks(assets / "o200k_base.tiktoken"), long_run=2)


@pytest.mark.parametrize(("text", "ids"), NUMERIC_GOLDENS.items())
def test_numeric_prompts_have_the_stated_ids(harmony: HarmonyTokenizer, text: str, ids: tuple[int, ...]) -> None:
    assert tuple(harmony.encode(text)) == ids
    assert harmony.decode(ids) == text


def test_numeric_prompts_have_the_stated_number_of_qwen_tokens(qwen_file: Path) -> None:
    from recipes.data.vocabulary import encode_with

    encode = encode_with(qwen_file)
    assert tuple(len(encode(text)) for text in NUMERIC_GOLDENS) == QWEN_COUNTS


def test_pattern_and_special_tokens_are_tiktokens_own(assets: Path, harmony: HarmonyTokenizer, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_args, **_kwargs: {})
    stated = openai_public.o200k_harmony()
    assert stated["pat_str"] == harmony._encoding._pat_str
    assert stated["special_tokens"] == {**harmony.special, "<|reserved_200018|>": 200018}


@given(st.lists(st.text(max_size=80), min_size=10, max_size=10))
@settings(max_examples=100, deadline=None)
def test_text_round_trips_and_openai_harmony_agrees(harmony: HarmonyTokenizer, assets: Path, texts: list[str]) -> None:
    other = _openai_harmony(assets)
    for text in texts:
        ids = harmony.encode(text)
        assert harmony.decode(ids) == text
        assert other.encode(text, disallowed_special=()) == ids


def test_special_looking_text_stays_text(harmony: HarmonyTokenizer) -> None:
    for name in [*harmony.special, "<|reserved_200018|>"][::37]:
        ids = harmony.encode(f"a{name}b")
        assert max(ids) < 199998
        assert harmony.decode(ids) == f"a{name}b"


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


def test_half_a_character_decodes_to_a_replacement(harmony: HarmonyTokenizer) -> None:
    halves = [number for number in range(256) if harmony.token_bytes(number) == b"\xe4"]
    assert harmony.decode(halves) == "\ufffd"
    assert harmony.decode_bytes(halves) == b"\xe4"


def test_some_ids_never_come_out_of_their_own_text(harmony: HarmonyTokenizer) -> None:
    texts = ((n, harmony.token_bytes(n)) for n in range(0, 199998, 11))
    valid = [(n, data.decode()) for n, data in texts if _is_utf8(data)]
    strange = [n for n, text in valid if harmony.encode(text) != [n]]
    assert 0 < len(strange) < len(valid) // 10
    assert all(harmony.decode(harmony.encode(text)) == text for _, text in valid)


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
    assert has_long_blanks(text) == (after != "\n")
    assert harmony.decode(harmony.encode(text)) == text


def test_runs_just_below_the_limit_take_linear_time(harmony: HarmonyTokenizer) -> None:
    text = (" " * 99_999 + "a") * 10 + " " * 400_000 + "\n"
    assert not has_long_blanks(text)
    assert harmony.decode(harmony.encode(text)) == text


def test_the_encoder_alone_fails_on_them(harmony: HarmonyTokenizer) -> None:
    with pytest.raises(BaseException, match="StackOverflow"):
        harmony._encoding.encode_ordinary(" " * 1_100_000)


def test_another_rank_file_is_refused(tmp_path: Path, assets: Path) -> None:
    with pytest.raises(RecipeRefused, match="not the published one"):
        HarmonyTokenizer.from_directory(tmp_path)
    data = bytearray((assets / "o200k_base.tiktoken").read_bytes())
    data[1000] ^= 1
    (tmp_path / "o200k_base.tiktoken").write_bytes(data)
    with pytest.raises(RecipeRefused, match="not the published one"):
        HarmonyTokenizer.from_directory(tmp_path)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


_loaded = {}


def _openai_harmony(assets: Path):  # type: ignore[no-untyped-def]
    if not _loaded:
        before = os.environ.get("TIKTOKEN_ENCODINGS_BASE")
        os.environ["TIKTOKEN_ENCODINGS_BASE"] = str(assets)
        try:
            _loaded["encoding"] = load_harmony_encoding("HarmonyGptOss")
        finally:
            del os.environ["TIKTOKEN_ENCODINGS_BASE"]
            if before is not None:
                os.environ["TIKTOKEN_ENCODINGS_BASE"] = before
    return _loaded["encoding"]
