from __future__ import annotations

import base64
import json
from hashlib import sha256
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from recipes.data.bpe import from_byte_level, load_ranks, merges, to_byte_level, tokenizer_json
from recipes.data.encodings import O200K_HARMONY, QWEN3
from recipes.data.harmony import HarmonyTokenizer
from recipes.data.vocabulary import encode_with
from vpstore.errors import RecipeRefused

# Pieces on which pre-tokenizers part: white space of all kinds, cases, marks, digits, contractions, look-alikes.
PIECES = (
    *" \t\n\r\v\f\x1c\x85\u00a0\u2003\u2028\u3000",
    *("a", "B", "ǅ", "ß", "ſ", "İ", "é", "e\u0301", "\u0301", "ʰ", "中", "한", "ا", "ש", "क्ष", "ไ"),
    *("0", "12", "3456", "½", "²", "٣", "Ⅷ"),
    *("'s", "'LL", "'ſ", "'", "\u2019", "!", "?!", "/", "//", "_", "-", "…", "€", "\x00", "\x7f", "\ufeff"),
    *("👩‍👧", "🏳️‍🌈", "<|start|>", "<|endoftext|>", "<think>", " the", "ing", "http://", "\r\n", "\n\n", "   "),
)
TEXTS = st.one_of(st.lists(st.sampled_from(PIECES), max_size=30).map("".join), st.text(max_size=60))


@pytest.mark.slow
@given(st.lists(TEXTS, min_size=20, max_size=20))
@settings(max_examples=150, deadline=None)
def test_tokenizers_file_encodes_as_tiktoken_does(
    o200k_file: Path, harmony: HarmonyTokenizer, texts: list[str]
) -> None:
    encode = _cached_encoder(o200k_file)
    assert [encode(text) for text in texts] == [harmony.encode(text) for text in texts]


def test_tokenizers_file_encodes_the_corpus_as_tiktoken_does(
    o200k_file: Path, harmony: HarmonyTokenizer, assets: Path
) -> None:
    encode = _cached_encoder(o200k_file)
    rows = (assets / "corpus/prose.jsonl").read_text(encoding="utf-8").splitlines()[::9]
    texts = [json.loads(row)["text"] for row in rows]
    assert sum(map(len, texts)) > 100_000
    assert all(encode(text) == harmony.encode(text) for text in texts)


def test_qwen_file_is_the_published_one_byte_for_byte(qwen_file: Path) -> None:
    published = "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"
    assert sha256(qwen_file.read_bytes()).hexdigest() == published


@given(TEXTS)
@settings(max_examples=100, deadline=None)
def test_qwen_file_encodes_as_tiktoken_does_after_nfc(qwen_file: Path, text: str) -> None:
    from unicodedata import normalize

    assert _cached_encoder(qwen_file)(text) == _qwen_tiktoken(qwen_file).encode_ordinary(normalize("NFC", text))


@given(st.binary(max_size=40))
def test_byte_level_spelling_round_trips(data: bytes) -> None:
    assert from_byte_level(to_byte_level(data)) == data
    assert to_byte_level(data).isprintable()


def test_merges_are_found_with_lower_ranks_only() -> None:
    ranks = {bytes((byte,)): byte for byte in range(256)} | {b"bc": 256, b"ab": 257, b"abc": 258, b"abcabc": 259}
    # bc has the lower rank, so abc is a + bc although ab is a token as well.
    assert list(merges(ranks)) == [(b"b", b"c"), (b"a", b"b"), (b"a", b"bc"), (b"abc", b"abc")]


def test_a_token_that_no_merge_reaches_is_refused() -> None:
    ranks = {bytes((byte,)): byte for byte in range(256)} | {b"abc": 256}
    with pytest.raises(RecipeRefused, match="cannot be reached"):
        list(merges(ranks))


def test_a_small_vocabulary_merges_by_rank() -> None:
    ranks = {bytes((byte,)): byte for byte in range(256)} | {b"bc": 256, b"ab": 257, b"abc": 258}
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json(ranks, pattern=r"\S+|\s+", special={"<x>": 259})))
    assert tokenizer.encode("abc ab<x>").ids == [258, 32, 257, 259]


def test_special_ids_with_a_gap_are_refused() -> None:
    ranks = {bytes((byte,)): byte for byte in range(256)}
    with pytest.raises(RecipeRefused, match="not contiguous"):
        tokenizer_json(ranks, pattern=".", special={"<x>": 257})


def _lines() -> list[bytes]:
    return [base64.b64encode(bytes((byte,))) + b" " + str(byte).encode() for byte in range(256)]


@pytest.mark.parametrize(
    ("place", "line"),
    [
        (3, b"Aw== 4"),  # rank out of order
        (3, b"Aw==  3"),  # two spaces
        (3, b"A!== 3"),  # not base64
        (3, b"Aw=== 3"),  # not canonical
        (3, b"Aw 3"),  # no padding
        (3, b" 3"),  # no token
        (3, b"Ag== 3"),  # repeated
        (3, b""),
        (255, b"//8= 255"),  # the byte 0xff has no token of its own
    ],
)
def test_a_damaged_rank_file_is_refused_with_its_line(tmp_path: Path, place: int, line: bytes) -> None:
    path = tmp_path / "ranks.tiktoken"
    lines = _lines()
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert len(load_ranks(path)) == 256
    lines[place] = line
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(RecipeRefused, match="rank"):
        load_ranks(path)


def test_a_missing_rank_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeRefused, match="cannot be read"):
        load_ranks(tmp_path / "none.tiktoken")


def test_special_tokens_are_what_tiktoken_and_qwen_say() -> None:
    assert len(O200K_HARMONY.special) == 1090
    assert O200K_HARMONY.special["<|endofprompt|>"] == 200018
    assert O200K_HARMONY.special["<|reserved_201087|>"] == 201087
    assert QWEN3.special["<|endoftext|>"] == 151643
    assert QWEN3.special["</think>"] == 151668


_encoders: dict[Path, object] = {}


def _cached_encoder(path: Path):  # type: ignore[no-untyped-def]
    if path not in _encoders:
        _encoders[path] = encode_with(path)
    return _encoders[path]


def _qwen_tiktoken(path: Path) -> tiktoken.Encoding:
    key = path.with_suffix(".tiktoken")
    if key not in _encoders:
        ranks = load_ranks(Path(__file__).parents[2] / "assets/qwen.tiktoken")
        _encoders[key] = tiktoken.Encoding(
            "qwen", pat_str=QWEN3.pattern, mergeable_ranks=ranks, special_tokens=dict(QWEN3.special)
        )
    found = _encoders[key]
    assert isinstance(found, tiktoken.Encoding)
    return found
