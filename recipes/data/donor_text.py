"""Corpus files -> token ids -> training rows, for the embedded donor.

Place in the path: corpus -> **here** -> embedded_donor. Documents that the split rule holds out never become rows.

Legend: B rows, T tokens.

Invariants: a document is `<|endoftext|>` followed by its text's tokens, so its first token is predicted from that
token alone; a text is NFC before it is encoded; no special token is parsed from text; the order of rows depends on the
seed and the epoch, not on the order of the files.

Example:
    corpus = read_corpus(files, encode, held_out_fraction=0.1)
    for ids_BT, labels_BT, documents_BT in training_rows(corpus, sequence_length=1024, sequences=8, seed=1):
        ...
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
import torch
from torch import Tensor

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


def training_rows(
    corpus: Corpus, *, sequence_length: int, sequences: int, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless steps of ids, labels and document numbers, each int64 [sequences, sequence_length].

    The documents of an epoch stand in a drawn order, one after the other, and are cut into rows; a document that a cut
    goes through continues in the next row without its beginning. The end of an epoch that fills no step opens the next.
    """
    generator = torch.Generator().manual_seed(seed)
    needed = sequences * sequence_length
    rest = np.empty(0, dtype=np.int32)
    while True:
        order = torch.randperm(len(corpus.train), generator=generator).tolist()
        pieces = [part for number in order for part in (np.array([END_OF_TEXT], np.int32), corpus.train[number].ids)]
        stream = np.concatenate([rest, *pieces])
        steps = (len(stream) - 1) // needed
        for step in range(steps):
            yield _rows(stream[step * needed : (step + 1) * needed + 1], sequences)
        rest = stream[steps * needed :]


def _rows(window: Ids, sequences: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.from_numpy(window[:-1].astype(np.int64)).view(sequences, -1)
    labels = torch.from_numpy(window[1:].astype(np.int64)).view(sequences, -1)
    return ids, labels, (ids == END_OF_TEXT).cumsum(dim=1)


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
