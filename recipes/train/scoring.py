"""Scores of given answers and of whole documents, for donors and students alike.

Place in the path: a model + ids -> **scoring** -> gates, evaluate. Many short prompts share a row as documents of their
own, so nothing is padded and no prompt sees another. Whole documents may share a pass likewise: one alone leaves a GPU
idle.

Legend: B rows, X rows or nothing, T tokens, H hidden, V vocabulary, N scored tokens.

Example:
    >>> [scores] = score_answers(reader, [([199999, 17], [18])])
    >>> scores.nll_N.shape
    torch.Size([1])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from recipes.train.losses import TokenScores, score_tokens, token_losses

_ROW_TOKENS = 1024  # of one row of prompts
_PACKED_ROW, _PACKED_ROWS = 2048, 16  # tokens of a row of documents, unless one is longer; rows of a pass

Prompt = tuple[Sequence[int], Sequence[int]]  # context ids (at least one), answer ids


class LanguageModel(Protocol):
    """What a donor and a student have in common."""

    @property
    def head_weight(self) -> Tensor:
        """[V, H]."""

    def forward_hidden(self, ids_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """[B, T, H], after the final norm."""


@dataclass(frozen=True)
class Reader:
    """A model and how its ids are to be read."""

    model: LanguageModel
    valid_vocab: int  # ids from here on are padding and never predicted
    chunk: int  # tokens whose scores are made at a time

    def score(self, ids_XT: Tensor, documents_XT: Tensor | None, at_N: Tensor, labels_N: Tensor) -> TokenScores:
        """Score `labels_N` as what follows the places `at_N` of one row, or of rows laid end to end; on the CPU."""
        hidden_NH, head_VH, labels = self._at(ids_XT, documents_XT, at_N, labels_N)
        scores = score_tokens(hidden_NH, head_VH, labels, valid_vocab=self.valid_vocab, chunk=self.chunk)
        return TokenScores(scores.nll_N.cpu(), scores.best_N.cpu())

    def losses(self, ids_XT: Tensor, documents_XT: Tensor | None, at_N: Tensor, labels_N: Tensor) -> Tensor:
        """The losses of `score` alone."""
        hidden_NH, head_VH, labels = self._at(ids_XT, documents_XT, at_N, labels_N)
        return token_losses(hidden_NH, head_VH, labels, valid_vocab=self.valid_vocab, chunk=self.chunk).cpu()

    @torch.no_grad()
    def _at(
        self, ids_XT: Tensor, documents_XT: Tensor | None, at_N: Tensor, labels_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        head_VH = self.model.head_weight
        documents = None if documents_XT is None else documents_XT.view(-1, ids_XT.shape[-1]).to(head_VH.device)
        ids_BT = ids_XT.view(-1, ids_XT.shape[-1]).to(head_VH.device)
        hidden_TH = self.model.forward_hidden(ids_BT, documents).flatten(0, 1)
        return hidden_TH[at_N.to(head_VH.device)], head_VH, labels_N.to(head_VH.device)


def score_answers(reader: Reader, prompts: Sequence[Prompt]) -> list[TokenScores]:
    """Teacher-forced scores of each prompt's answer, in the order of the prompts, on the CPU."""
    found: list[TokenScores] = []
    for group in _rows(prompts):
        ids: list[int] = []
        documents: list[int] = []
        places: list[int] = []
        labels: list[int] = []
        for number, (context, answer) in enumerate(group):
            places += range(len(ids) + len(context) - 1, len(ids) + len(context) + len(answer) - 1)
            labels += answer
            ids += [*context, *answer]
            documents += [number] * (len(context) + len(answer))
        tables = (torch.tensor(values) for values in (ids, documents, places, labels))
        scores = reader.score(*tables)
        sizes = [len(answer) for _, answer in group]
        parts = zip(torch.split(scores.nll_N, sizes), torch.split(scores.best_N, sizes), strict=True)
        found += [TokenScores(nll_N, best_N) for nll_N, best_N in parts]
    return found


def _rows(prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
    row: list[Prompt] = []
    size = 0
    for prompt in prompts:
        length = len(prompt[0]) + len(prompt[1])
        if row and size + length > _ROW_TOKENS:
            yield row
            row, size = [], 0
        row.append(prompt)
        size += length
    if row:
        yield row


def score_document(reader: Reader, ids: Sequence[int], *, separator: int) -> Tensor:
    """Nats of every token of a document, the first one too: it is predicted from the separator.

    Returns: float32 [len(ids)] on the CPU.
    """
    row = torch.tensor([separator, *ids])
    places = torch.arange(len(ids))
    return reader.losses(row[:-1], None, places, row[1:])


def score_documents(
    reader: Reader, documents: Sequence[Sequence[int]], *, separator: int, is_packed: bool
) -> Iterator[Tensor]:
    """What `score_document` gives for each document, in their order.

    Args:    is_packed: by passes over many documents. Each sees itself alone either way, so the figures agree but for
             the order of sums.
    """
    if not is_packed:
        yield from (score_document(reader, ids, separator=separator) for ids in documents)
        return
    rows = list(_packed(documents))
    for start in range(0, len(rows), _PACKED_ROWS):
        yield from _score_rows(reader, rows[start : start + _PACKED_ROWS], separator=separator)


def _packed(documents: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Consecutive documents that fit into a row together; one that fits into none has its own."""
    row: list[Sequence[int]] = []
    for ids in documents:
        if row and sum(map(len, row)) + len(ids) > _PACKED_ROW:
            yield row
            row = []
        row.append(ids)
    if row:
        yield row


def _score_rows(reader: Reader, rows: Sequence[Sequence[Sequence[int]]], *, separator: int) -> list[Tensor]:
    width = max(sum(map(len, row)) for row in rows)
    ids_BT = torch.full((len(rows), width), separator)
    documents_BT = torch.full_like(ids_BT, -1)  # padding, of which routers keep no count
    places: list[int] = []
    for number, row in enumerate(rows):
        at = 0
        for document, ids in enumerate(row):
            ids_BT[number, at : at + len(ids)] = torch.tensor([separator, *ids[:-1]][: len(ids)])
            documents_BT[number, at : at + len(ids)] = document
            places += range(number * width + at, number * width + at + len(ids))
            at += len(ids)
    labels_N = torch.tensor([label for row in rows for ids in row for label in ids], dtype=torch.int64)
    nll_N = reader.losses(ids_BT, documents_BT, torch.tensor(places, dtype=torch.int64), labels_N)
    return list(torch.split(nll_N, [len(ids) for row in rows for ids in row]))
