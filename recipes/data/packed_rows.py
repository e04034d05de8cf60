"""Rows of tokens by their number, under each of the three packings.

Place in the path: aligned datasets, order, packing -> **packed_rows** -> batches.

`document_bounded` and `whole_row` slice the stream of tokens, which is the documents of one epoch after the other: row
r is its tokens [r * T, (r + 1) * T), so a row may begin and end inside a document, and the part in the next row is a
document of its own. They differ only in what the row says of documents: where each ends, or that all of it is one.
`best_fit` puts whole documents into a row and padding behind them (packing.py says which ones).

Invariants: a row follows from its number, the seed and the packing; every epoch shows every token once; index t of mask
and span is the stored one and speaks of the label after it. A label is the next token of the same document; after a
document's end, where the stored mask is 0, it is whatever follows in the stream or, packed by best fit, PAD_ID.
Padding is PAD_ID with mask and span 0, in a document of its own, NO_DOCUMENT.

Shapes: T tokens a row.

Example:
    rows = packed_rows(AlignedDataset(folder, "train"), "best_fit", sequence_length=2048, seed=0)
    ids, labels, mask, span, documents = rows.row(0)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from recipes.data.encodings import O200K_HARMONY
from recipes.data.order import document_order
from recipes.data.packing import BestFit, Packing, Piece
from vpstore.errors import RecipeRefused

PAD_ID = O200K_HARMONY.special["<|endoftext|>"]
NO_DOCUMENT = -1  # the document of padding
_Array = npt.NDArray[Any]


class Documents(Protocol):
    """What rows are made of: aligned arrays of tokens, mask and span."""

    where: str  # for refusals
    lengths: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Number of documents."""

    @property
    def tokens(self) -> int:
        """Number of tokens of one epoch."""

    def document(self, number: int) -> tuple[_Array, _Array, _Array]:
        """Tokens, loss mask and span of one document."""


class PackedRows(Protocol):
    """An endless sequence of rows."""

    @property
    def documents_cut(self) -> int | None:
        """Documents of an epoch that no row holds whole; None: rows are cut wherever they end."""

    @property
    def fill(self) -> float:
        """Share of the places that hold tokens; measured on the first rows if it is not 1."""

    def row(self, number: int) -> _Array:
        """[5, T]: ids, labels, mask, span, documents."""

    def tokens_before(self, number: int) -> int:
        """Tokens in all rows before this one, padding left out."""


def packed_rows(documents: Documents, packing: Packing, *, sequence_length: int, seed: int) -> PackedRows:
    """The rows of a data set.

    Args:    sequence_length: T. seed: decides the order of the documents, with the epoch.
    Raises:  RecipeRefused: an empty data set, or a length below 1.
    """
    require_sizes(documents, sequence_length)
    if packing == "best_fit":
        return WholeDocuments(documents, sequence_length=sequence_length, seed=seed)
    return SlicedStream(documents, packing, sequence_length=sequence_length, seed=seed)


def require_sizes(documents: Documents, *sizes: int) -> None:
    """Refuse what no row can be made of.

    Raises:  RecipeRefused: an empty data set, or a size below 1.
    """
    if min(documents.tokens, *sizes) < 1:
        raise RecipeRefused(
            "no batch can be made",
            where=documents.where,
            expected="at least one token in the data set, and sizes of at least 1",
            found=f"{documents.tokens} tokens, sizes {', '.join(map(str, sizes))}",
            next_step="mend the sizes in the TOML, or build the data set again",
        )


class WholeDocuments:
    """Rows of whole documents and padding."""

    def __init__(self, documents: Documents, *, sequence_length: int, seed: int) -> None:
        self._documents, self._length = documents, sequence_length
        self._packing = BestFit(documents.lengths, row_tokens=sequence_length, seed=seed)

    @property
    def documents_cut(self) -> int | None:
        """Those longer than a row."""
        return self._packing.documents_cut

    @property
    def fill(self) -> float:
        """Of the first rows."""
        return self._packing.fill

    def row(self, number: int) -> _Array:
        """Documents, longest first, then padding."""
        return filled_row(self._documents, self._packing.row(number), sequence_length=self._length)

    def tokens_before(self, number: int) -> int:
        """Padding left out."""
        return self._packing.tokens_before(number)


def filled_row(documents: Documents, pieces: Sequence[Piece], *, sequence_length: int) -> _Array:
    """[5, T]: the pieces one after the other, then padding.

    A piece that a longer document was cut into keeps its last label, the first token of the next piece.
    """
    row = np.empty((5, sequence_length), np.int64)
    row.T[:] = (PAD_ID, PAD_ID, 0, 0, NO_DOCUMENT)
    at = 0
    for serial, (number, start, size) in enumerate(pieces):
        tokens, mask, span = documents.document(number)
        part, place = slice(start, start + size), slice(at, at + size)
        following = tokens[start + 1 : start + size + 1]
        row[0, place], row[2, place], row[3, place], row[4, place] = tokens[part], mask[part], span[part], serial
        row[1, at : at + len(following)] = following
        at += size
    return row


class SlicedStream:
    """The endless stream of tokens, cut into rows; `seed` None keeps the data set's own order."""

    documents_cut: int | None = None
    fill: float = 1.0

    def __init__(self, documents: Documents, packing: Packing, *, sequence_length: int, seed: int | None) -> None:
        self._documents, self._length, self._seed = documents, sequence_length, seed
        self._is_bounded = packing == "document_bounded"
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._ends: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def row(self, number: int) -> _Array:
        """The next token of the stream is the last label."""
        return self.window(number * self._length, self._length)

    def tokens_before(self, number: int) -> int:
        """There is no padding."""
        return number * self._length

    def window(self, start: int, length: int) -> _Array:
        """[5, length]: ids, labels, mask, span, documents of the stream from `start` on."""
        pieces = [np.empty((4, 0), np.int64)]
        epoch, at = divmod(start, self._documents.tokens)
        missing, serial = length + 1, 0
        while missing:
            self._enter(epoch)
            place = int(np.searchsorted(self._ends, at, side="right"))
            tokens, mask, span = self._documents.document(int(self._order[place]))
            skipped = at - (int(self._ends[place]) - len(tokens))
            part = slice(skipped, skipped + missing)
            ids = np.asarray(tokens[part], dtype=np.int64)
            numbers = np.full(ids.size, serial if self._is_bounded else 0)
            pieces.append(np.stack([ids, mask[part], span[part], numbers]).astype(np.int64))
            missing, serial, at = missing - ids.size, serial + 1, at + ids.size
            if at == self._documents.tokens:
                epoch, at = epoch + 1, 0
        ids, mask, span, documents = np.concatenate(pieces, axis=1)
        return np.stack([ids[:-1], ids[1:], mask[:-1], span[:-1], documents[:-1]])

    def _enter(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._epoch = epoch
            n = len(self._documents)
            self._order = np.arange(n) if self._seed is None else document_order(n, seed=self._seed, epoch=epoch)
            self._ends = np.cumsum(self._documents.lengths[self._order])
