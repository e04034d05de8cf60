"""Corpus files -> token ids -> training rows, for the embedded donor.

Place in the path: corpus -> **here** -> embedded_donor. Documents that the split rule holds out never become rows.

Legend: B rows, T tokens.

Invariants: a document is `<|endoftext|>` followed by its text's tokens, so its first token is predicted from that
token alone; a text is NFC before it is encoded; no special token is parsed from text; the order of rows depends on the
seed and the epoch, not on the order of the files.

Example:
    corpus = read_corpus(files, encode, held_out_fraction=0.1)
    rows = packed_rows(CorpusDocuments(corpus, where="prose"), "document_bounded", sequence_length=1024, seed=1)
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tiktoken

from recipes.data.bpe import load_ranks
from recipes.data.corpus import Document
from recipes.data.encodings import QWEN3
from recipes.data.rows import PROSE_COLUMNS, JsonLines
from recipes.data.split import is_held_out
from recipes.data.text import clean_text
from vpstore.errors import RecipeRefused

END_OF_TEXT = QWEN3.special["<|endoftext|>"]
_ENCODING_THREADS = 8  # order and result do not depend on it

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class EncodedDocument:
    """One document: its ids without `<|endoftext|>`, and the length of its text in UTF-8."""

    doc_id: str
    ids: Ids
    size_bytes: int


@dataclass(frozen=True)
class Corpus:
    """The documents of all files, ordered by doc_id; one that several files have counts in the first only."""

    train: Sequence[EncodedDocument]  # one document as often as an epoch has it
    held_out: Sequence[EncodedDocument]  # of the evaluated file only
    counts: Mapping[str, Mapping[str, int]]  # file -> documents, held_out, train_tokens, and what was dropped


def qwen_encoder(ranks_path: Path) -> Callable[[str], Ids]:
    """Text -> ids as Qwen's tokenizer gives them: NFC first, special tokens never parsed.

    Args:    ranks_path: `qwen.tiktoken`.
    """
    ranks = load_ranks(ranks_path)
    encoding = tiktoken.Encoding(
        "qwen3", pat_str=QWEN3.pattern, mergeable_ranks=ranks, special_tokens=dict(QWEN3.special)
    )

    def encode(text: str) -> Ids:
        return np.asarray(encoding.encode_ordinary(unicodedata.normalize("NFC", text)), dtype=np.int32)

    return encode


def read_corpus(
    files: Mapping[str, Path],
    encode: Callable[[str], Ids],
    *,
    evaluated: str,
    held_out_fraction: float,
    copies: Mapping[str, int],
) -> Corpus:
    """Read, split and encode.

    Args:    files: name -> JSON lines of doc_id and text; a doc_id that several files have counts once, in the
             evaluated file first and then by name.
             evaluated: the file whose held-out documents are kept for measuring.
             copies: how often an epoch has a file's documents; 1 for a file that is not named.
    Raises:  RecipeRefused: no such file, or nothing to train on or to measure.
    """
    if evaluated not in files:
        raise RecipeRefused(
            "the evaluated corpus is not a source", expected=" or ".join(sorted(files)), found=evaluated
        )
    train: list[EncodedDocument] = []
    held: list[EncodedDocument] = []
    counts: dict[str, dict[str, int]] = {}
    seen: set[str] = set()
    for name in sorted(files, key=lambda each: (each != evaluated, each)):
        drops: Counter[str] = Counter()
        fresh = [each for each in _documents(files[name], drops) if each.doc_id not in seen]
        seen.update(each.doc_id for each in fresh)
        outside = {
            each.doc_id for each in fresh if is_held_out(each.doc_id, fraction=held_out_fraction, digest="sha256")
        }
        encoded = _encode_all([each for each in fresh if name == evaluated or each.doc_id not in outside], encode)
        held += [each for each in encoded if each.doc_id in outside]
        mine = [each for each in encoded if each.doc_id not in outside]
        train += mine * copies.get(name, 1)
        counts[name] = {"documents": len(fresh), "held_out": len(outside), **drops}
        counts[name]["train_tokens"] = sum(len(each.ids) + 1 for each in mine)
    if not train or not held:
        raise RecipeRefused(
            "a corpus has nothing to train on or nothing to measure",
            where=evaluated,
            expected="at least one document on each side",
            found=f"{len(train)} to train on, {len(held)} held out",
        )
    return Corpus(_by_name(train), _by_name(held), counts)


def _documents(path: Path, drops: Counter[str]) -> Iterator[Document]:
    with JsonLines(path, PROSE_COLUMNS) as file:
        for _, row in file.rows():
            text = clean_text(row["text"], nul_policy="drop", drops=drops)
            if text is not None:
                yield Document(row["doc_id"], text)


def _encode_all(found: Sequence[Document], encode: Callable[[str], Ids]) -> list[EncodedDocument]:
    with ThreadPoolExecutor(_ENCODING_THREADS) as pool:  # the encoder releases the interpreter lock
        ids = pool.map(encode, (each.text for each in found))
        return [
            EncodedDocument(each.doc_id, one, len(each.text.encode())) for each, one in zip(found, ids, strict=True)
        ]


def _by_name(found: list[EncodedDocument]) -> list[EncodedDocument]:
    return sorted(found, key=lambda each: each.doc_id)


class CorpusDocuments:
    """The documents of an epoch as the packing wants them: each behind `<|endoftext|>`, every label counted.

    The label of a document's last token is the `<|endoftext|>` before the next one, so the end of a text is learned.
    """

    def __init__(self, corpus: Corpus, *, where: str) -> None:
        self.where, self._documents = where, corpus.train
        self.lengths = np.array([len(each.ids) + 1 for each in corpus.train], dtype=np.int64)

    def __len__(self) -> int:
        """Number of documents, copies counted."""
        return len(self._documents)

    @property
    def tokens(self) -> int:
        """Number of tokens of one epoch."""
        return int(self.lengths.sum())

    def document(self, number: int) -> tuple[Ids, npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """Tokens, loss mask and span of one document."""
        ids = np.concatenate([np.array([END_OF_TEXT], np.int32), self._documents[number].ids])
        return ids, np.ones(len(ids), np.uint8), np.zeros(len(ids), np.uint8)


def evaluation_chunks(document: EncodedDocument, sequence_length: int) -> list[tuple[Ids, Ids]]:
    """Inputs and labels that predict every token of a text exactly once.

    The first token is predicted from `<|endoftext|>`. A longer text goes on in chunks of `sequence_length` inputs, each
    of which starts with fresh context at the last token that was predicted; the end of the text is not predicted.
    """
    whole = np.concatenate([np.array([END_OF_TEXT], np.int32), document.ids])
    starts = range(0, len(document.ids), sequence_length)
    return [
        (whole[at : at + sequence_length][: len(whole) - 1 - at], whole[at + 1 :][:sequence_length]) for at in starts
    ]
