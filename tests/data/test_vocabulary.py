from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.data.bpe import load_ranks
from recipes.data.encodings import O200K_HARMONY, QWEN3
from recipes.data.vocabulary import encode_with, read_vocabulary
from vpstore.errors import RecipeRefused


def test_tokens_are_those_of_the_rank_file(o200k_file: Path, assets: Path) -> None:
    vocabulary = read_vocabulary(o200k_file)
    ranks = load_ranks(assets / "o200k_base.tiktoken")
    assert vocabulary.tokens == [*ranks, *[None] * 1090]
    assert vocabulary.special == O200K_HARMONY.special


def test_donor_vocabulary_and_the_stated_number_of_shared_tokens(o200k_file: Path, qwen_file: Path) -> None:
    donor, student = read_vocabulary(qwen_file), read_vocabulary(o200k_file)
    assert len(donor.tokens) == 151669
    assert donor.special == QWEN3.special
    shared = (set(donor.tokens) & set(student.tokens)) - {None}
    assert len(shared) == 98863


def test_an_id_without_a_token_is_none(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    document = {"added_tokens": [{"content": "<x>", "id": 5}], "model": {"vocab": {"a": 0, "Ġb": 2}}}
    path.write_text(json.dumps(document))
    assert read_vocabulary(path).tokens == [b"a", None, b" b", None, None, None]


def test_text_of_special_tokens_is_encoded_as_text(qwen_file: Path) -> None:
    encode = encode_with(qwen_file)
    for name in QWEN3.special:
        assert max(encode(f"a {name} b")) < 151643


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"added_tokens": []}',
        '{"added_tokens": [], "model": {"vocab": {"a": "x"}}}',
        '{"added_tokens": [], "model": {"vocab": {"\u4e2d": 0}}}',  # no spelling of a byte
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(RecipeRefused, match="not what it should be"):
        read_vocabulary(path)
    with pytest.raises(RecipeRefused, match="not what it should be"):
        encode_with(path)


def test_a_tokenizer_of_another_model_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(
        '{"added_tokens": [], "model": {"type": "Unigram", "vocab": [["a", 0.0]]}}'
    )
    with pytest.raises(RecipeRefused) as caught:
        read_vocabulary(tmp_path / "tokenizer.json")
    assert "Unigram" in caught.value.next_step


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeRefused, match="cannot be read"):
        read_vocabulary(tmp_path / "tokenizer.json")


def test_a_lone_surrogate_is_refused(qwen_file: Path) -> None:
    with pytest.raises(RecipeRefused, match="surrogate"):
        encode_with(qwen_file)("\ud83d")
