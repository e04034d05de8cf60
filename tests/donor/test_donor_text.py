"""Corpus files to training rows and evaluation chunks, with one id a byte."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.data.batches import packed_batches
from recipes.data.donor_text import (
    END_OF_TEXT,
    Corpus,
    CorpusDocuments,
    EncodedDocument,
    Ids,
    evaluation_chunks,
    qwen_encoder,
    read_corpus,
)
from recipes.data.packed_rows import packed_rows
from recipes.data.split import is_held_out
from vpstore.errors import RecipeRefused

RANKS = Path(__file__).parent.parent.parent / "assets/qwen.tiktoken"


def by_byte(text: str) -> Ids:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def encoded(name: str, text: str) -> EncodedDocument:
    return EncodedDocument(name, by_byte(text), len(text.encode()))


def write(path: Path, rows: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps({"doc_id": name, "text": text}) + "\n" for name, text in rows.items()))
    return path


def test_held_out_documents_of_every_file_are_never_trained_on(tmp_path: Path) -> None:
    own = {f"own:{n}": f"text {n}" for n in range(60)}
    other = {f"other:{n}": f"else {n}" for n in range(60)}
    files = {"a": write(tmp_path / "a", {**other, "own:1": "other bytes"}), "b": write(tmp_path / "b", own)}
    corpus = read_corpus(files, by_byte, evaluated="b", held_out_fraction=0.3, copies={"a": 2})
    outside = {name for name in (*own, *other) if is_held_out(name, fraction=0.3, digest="sha256")}
    trained = [each.doc_id for each in corpus.train]
    assert {each.doc_id for each in corpus.held_out} == outside & set(own)
    assert set(trained) == {*own, *other} - outside
    assert all(trained.count(name) == (2 if name in other else 1) for name in set(trained))
    assert corpus.counts["a"]["documents"] == 60  # own:1 counts in the evaluated file
    assert corpus.counts["a"]["held_out"] == len(outside & set(other))
    expected = sum(len(text) + 1 for name, text in own.items() if name not in outside)
    assert corpus.counts["b"]["train_tokens"] == expected


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    files = {"a": write(tmp_path / "a", {"one": "text"})}
    with pytest.raises(RecipeRefused, match="not a source"):
        read_corpus(files, by_byte, evaluated="b", held_out_fraction=0.1, copies={})
    with pytest.raises(RecipeRefused, match="nothing to train on or nothing to measure"):
        read_corpus(files, by_byte, evaluated="a", held_out_fraction=0.0, copies={})


def test_a_document_without_text_is_dropped_and_counted(tmp_path: Path) -> None:
    rows = {**{f"d{n}": "text" for n in range(30)}, "blank": " \n"}
    corpus = read_corpus({"a": write(tmp_path / "a", rows)}, by_byte, evaluated="a", held_out_fraction=0.3, copies={})
    assert corpus.counts["a"]["empty"] == 1
    assert corpus.counts["a"]["documents"] == 30


TEXTS = st.lists(st.text(alphabet="abcdef", min_size=1, max_size=9), min_size=2, max_size=6)


@settings(max_examples=30, deadline=None)
@given(texts=TEXTS, length=st.integers(2, 7), sequences=st.integers(1, 3), seed=st.integers(0, 9))
def test_rows_are_the_epochs_documents_end_to_end(texts: list[str], length: int, sequences: int, seed: int) -> None:
    corpus = Corpus([encoded(str(n), text) for n, text in enumerate(texts)], [], {})
    documents = CorpusDocuments(corpus, where="texts")
    rows = packed_rows(documents, "document_bounded", sequence_length=length, seed=seed)
    steps = [
        (batch.ids_BT, batch.labels_BT, batch.documents_BT)
        for batch in islice(packed_batches(rows, sequences=sequences, start_step=0), 12)
    ]
    ids = torch.cat([step[0].flatten() for step in steps])
    labels = torch.cat([step[1].flatten() for step in steps])
    assert torch.equal(ids[1:], labels[:-1])
    text = "".join("|" if one == END_OF_TEXT else chr(one) for one in ids.tolist())
    pieces = text.split("|")[1:]
    whole = len(pieces) - 1
    for start in range(0, whole - len(texts) + 1, len(texts)):
        assert sorted(pieces[start : start + len(texts)]) == sorted(texts)
    for ids_BT, _, documents_BT in steps:
        begins = documents_BT[:, 1:] != documents_BT[:, :-1]
        assert torch.equal(begins, ids_BT[:, 1:] == END_OF_TEXT)


@given(size=st.integers(1, 30), length=st.integers(1, 12))
def test_chunks_predict_every_token_once_and_the_first_from_the_separator(size: int, length: int) -> None:
    document = EncodedDocument("d", np.arange(size, dtype=np.int32), size)
    chunks = evaluation_chunks(document, length)
    assert chunks[0][0][0] == END_OF_TEXT
    assert np.concatenate([labels for _, labels in chunks]).tolist() == list(range(size))
    for inputs, labels in chunks:
        assert 0 < len(inputs) == len(labels) <= length
        assert inputs[1:].tolist() == labels[:-1].tolist()


def test_qwen_ids_are_those_of_the_shipped_tokenizer() -> None:
    from tokenizers import Tokenizer

    encode = qwen_encoder(RANKS)
    shipped = Tokenizer.from_file(str(RANKS.parent / "embedded_donor/tokenizer.json"))
    for text in ("SELECT * FROM weather;\n\n    x = 1234", "e\u0301t\u00e9 \u4e2d\u6587", "don't  stop"):
        assert encode(text).tolist() == shipped.encode(text).ids
    plain = encode("<|endoftext|>").tolist()
    assert END_OF_TEXT not in plain
    assert len(plain) > 1
