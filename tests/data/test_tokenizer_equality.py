"""The tokenizer against tiktoken's own o200k_harmony, openai-harmony and Hugging Face's, on generated text."""

from __future__ import annotations

import random
from collections.abc import Iterator
from hashlib import sha1, sha256
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from openai_harmony import HarmonyEncoding
from tiktoken_ext import openai_public
from tokenizers import Tokenizer

from recipes.data.conversation import Frame, HarmonyRenderer
from recipes.data.encodings import O200K_HARMONY
from recipes.data.harmony import HarmonyTokenizer
from recipes.data.vocabulary import encode_with

RANKS_URL = "https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken"
SPELLED = 200018  # the id with two names
TEXTS = 4000
TEXTS_DIGEST = "9beddc489e7d02046d105f25ab5aa657c7942e5373171461c6c1b15ce4c6c276"

# What pre-tokenizers part on, a class a row; a text strings together draws from all of them.
CLASSES: tuple[tuple[str, ...], ...] = (
    tuple(" \t\n\r\v\f\x1c\x1f\x85\u00a0\u1680\u2003\u2028\u2029\u202f\u205f\u3000"),
    (" ", "  ", "   ", "    ", "\n\n", "\r\n", " \n", "\n ", "\t\t", "\n\n\n", " \r\n\r\n "),
    ("a", "b", "I", "A", "Z", "the", " the", "ing", "Hello", "WORLD", "camelCase", "HTTPServer", "iPhone"),
    ("'s", "'T", "'re", "'VE", "'ll", "'LL", "'D", "'ſ", "\u2019s", "'", "''", "don't", "I'M"),
    ("0", "1", "12", "123", "1234", "1234567", "3.14", "1e-10", "½", "²", "٣", "१२३", "Ⅷ", "௧", "2025-08-05"),
    tuple('!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~'),
    ("//", "/*", "*/", "->", "=>", "...", "!!!", "?!\n", "!\n//", "://", "_/\r\n", "----", "====", "%20"),
    ("é", "e\u0301", "ß", "ſ", "İ", "ı", "ǅ", "ﬁ", "ʰ", "\u0301", "Å", "\u212b", "σς", "ΑΩ", "нет", "НЕТ"),
    ("中", "中文", "日本語", "ひら", "カナ", "한국어", "ไทย", "हिन्दी", "עברית", "العربية", "中A", "中a", "亚洲AV"),
    ("👍", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇳🇱", "\u200d", "\u200b", "\ufe0f", "\ufeff", "\ufffd", "𝔘", "𒀀", "\U0010ffff"),
    ("\x00", "\x01", "\x1b[0m", "\x7f", "\u0080", "\u009f", "\u00ad", "\u202e", "\ue000", "\ufdd0", "\uffff"),
    ("<|start|>", "<|end|>", "<|return|>", "<|endoftext|>", "<|reserved_200018|>", "<|", "|>", "<think>", "<|im_end|>"),
)


def generated(count: int, *, seed: int) -> Iterator[str]:
    """Texts of 1 to 24 draws: from all classes, from two of them, or of any code points."""
    draw = random.Random(seed)
    for number in range(count):
        classes = CLASSES if number % 3 else draw.sample(CLASSES, 2)
        length = draw.randint(1, 24)
        if number % 10 == 9:
            yield "".join(map(scalar, (draw.randrange(0x110000 - 0x800) for _ in range(length))))
        else:
            yield "".join(draw.choice(draw.choice(classes)) for _ in range(length))


def scalar(number: int) -> str:
    return chr(number if number < 0xD800 else number + 0x800)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(generated(TEXTS, seed=20250805))


@pytest.fixture(scope="module")
def tiktokens(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> tiktoken.Encoding:
    """tiktoken's own o200k_harmony, by its own loader: it finds the rank file in its cache, and may not go further."""
    cache = tmp_path_factory.mktemp("tiktoken-cache")
    data = (assets / "o200k_base.tiktoken").read_bytes()
    (cache / sha1(RANKS_URL.encode()).hexdigest()).write_bytes(data)

    def nothing_is_read(path: str) -> bytes:
        raise AssertionError(f"tiktoken reads {path}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        patch.setattr(tiktoken.load, "read_file", nothing_is_read)
        return tiktoken.Encoding(**openai_public.o200k_harmony())


@pytest.fixture(scope="module")
def openais(assets: Path) -> HarmonyEncoding:
    return HarmonyRenderer(assets, Frame("You are a test.", "High", "2026-01-01", "2024-06", "Answer."))._encoding


def test_the_generator_makes_the_same_texts_for_ever(texts: list[str]) -> None:
    assert sha256("\0\0".join(texts).encode()).hexdigest() == TEXTS_DIGEST
    assert len(set(texts)) > 0.95 * TEXTS


def test_the_encoding_is_the_registered_one(tiktokens: tiktoken.Encoding, harmony: HarmonyTokenizer) -> None:
    ours = harmony._encoding
    assert tiktokens.name == ours.name == "o200k_harmony"
    assert tiktokens.n_vocab == ours.n_vocab == harmony.n_vocab == 201088
    assert tiktokens._pat_str == ours._pat_str
    assert tiktokens._mergeable_ranks == ours._mergeable_ranks
    assert tiktokens._special_tokens == {**ours._special_tokens, "<|reserved_200018|>": SPELLED}


def test_generated_texts_encode_as_tiktokens_do(
    tiktokens: tiktoken.Encoding, harmony: HarmonyTokenizer, texts: list[str]
) -> None:
    assert [harmony.encode(text) for text in texts] == tiktokens.encode_ordinary_batch(texts, num_threads=1)
    assert [harmony.decode(harmony.encode(text)) for text in texts] == texts


def test_generated_texts_encode_as_openai_harmonys_do(
    openais: HarmonyEncoding, harmony: HarmonyTokenizer, texts: list[str]
) -> None:
    differing = [text for text in texts if openais.encode(text, disallowed_special=()) != harmony.encode(text)]
    assert differing == []


@pytest.mark.slow
def test_generated_texts_encode_as_the_tokenizers_file_does(
    o200k_file: Path, harmony: HarmonyTokenizer, texts: list[str]
) -> None:
    encode = encode_with(o200k_file)
    assert [text for text in texts if encode(text) != harmony.encode(text)] == []


def test_stock_tokenizers_read_names_as_special_tokens_unless_told(o200k_file: Path, harmony: HarmonyTokenizer) -> None:
    stock = Tokenizer.from_file(str(o200k_file))
    assert stock.encode("<|end|>", add_special_tokens=False).ids == [200007]
    stock.encode_special_tokens = True
    assert stock.encode("<|end|>", add_special_tokens=False).ids == harmony.encode("<|end|>")


@given(st.lists(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(sum(CLASSES, ()))).map("".join)), max_size=20))
@settings(max_examples=100, deadline=None)
def test_any_texts_encode_alike(
    tiktokens: tiktoken.Encoding, openais: HarmonyEncoding, harmony: HarmonyTokenizer, texts: list[str]
) -> None:
    for text in texts:
        ids = harmony.encode(text)
        assert ids == tiktokens.encode_ordinary(text) == openais.encode(text, disallowed_special=())
        assert harmony.decode(ids) == text


@given(st.lists(st.one_of(st.integers(0, 201087), st.integers(199998, 200030), st.integers(0, 255)), max_size=20))
@settings(max_examples=300, deadline=None)
def test_any_ids_decode_alike(
    tiktokens: tiktoken.Encoding, openais: HarmonyEncoding, harmony: HarmonyTokenizer, ids: list[int]
) -> None:
    ids = [number for number in ids if number != SPELLED]
    assert harmony.decode_bytes(ids) == tiktokens.decode_bytes(ids)
    assert harmony.decode(ids) == tiktokens.decode(ids) == openais.decode(ids)


def test_every_single_id_stands_for_the_same_bytes(tiktokens: tiktoken.Encoding, harmony: HarmonyTokenizer) -> None:
    ids = [number for number in range(harmony.n_vocab) if number != SPELLED]
    assert [harmony.token_bytes(number) for number in ids] == [
        tiktokens.decode_single_token_bytes(number) for number in ids
    ]


def test_names_of_special_tokens_lead_to_the_same_ids(
    tiktokens: tiktoken.Encoding, openais: HarmonyEncoding, harmony: HarmonyTokenizer
) -> None:
    for name, number in harmony.special.items():
        assert tiktokens.encode(name, allowed_special="all") == [number]
        if number != SPELLED:
            assert openais.encode(name, allowed_special="all") == [number]


def test_openai_harmony_knows_one_id_too_many(openais: HarmonyEncoding, harmony: HarmonyTokenizer) -> None:
    assert openais.is_special_token(harmony.n_vocab)
    assert openais.decode([harmony.n_vocab]) == "<|reserved_201088|>"


DAMAGES = {
    "two digits a piece": (r"\p{N}{1,3}", r"\p{N}{1,2}"),
    "small contractions only": ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'s|'t|'re|'ve|'m|'ll|'d)"),
    "no slash behind punctuation": (r"[\r\n/]*", r"[\r\n]*"),
    "white space does not leave its last character": (r"\s+(?!\S)|", ""),
    "line breaks like other white space": (r"\s*[\r\n]+|", ""),
    "marks are no letters": (r"\p{M}", ""),
    "titlecase is no letter": (r"\p{Lt}", ""),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_another_expression_would_be_noticed(harmony: HarmonyTokenizer, texts: list[str], name: str) -> None:
    before, after = DAMAGES[name]
    assert before in O200K_HARMONY.pattern
    damaged = tiktoken.Encoding(
        name,
        pat_str=O200K_HARMONY.pattern.replace(before, after),
        mergeable_ranks=harmony._encoding._mergeable_ranks,
        special_tokens={},
    )
    assert damaged.encode_ordinary_batch(texts, num_threads=1) != [harmony.encode(text) for text in texts]
