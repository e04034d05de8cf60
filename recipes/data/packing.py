"""Best-fit packing: which documents share a row, so that none is cut that fits into one.

Place in the path: lengths of documents -> **packing** -> packed_rows -> batches. Numbers alone: no tokens, no tensors.

Invariants: the documents of an epoch, in its shuffled order, come in blocks of BLOCK_DOCUMENTS; each block is packed by
itself, and its rows are then put in an order that (seed, epoch, block) decide. So every piece of every document is in
exactly one row of its epoch, a row depends on its number alone, and long documents do not gather in the first rows. A
document longer than a row becomes pieces of a whole row each and one of what is left; no other document is cut. A block
is packed when one of its rows is asked for; only the newest block is kept, and two running sums for each block passed.

Example:
    >>> best_fit_decreasing([3, 5, 2, 4], capacity=7).tolist()  # 5 + 2 and 4 + 3
    [1, 0, 0, 1]

Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv:2404.10830.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from recipes.data.order import document_order, row_order

Packing = Literal["document_bounded", "whole_row", "best_fit"]
BLOCK_DOCUMENTS = 4096
_FILL_BLOCKS = 16  # of which the share of filled places is measured
_Ints = npt.NDArray[np.int64]


class Piece(NamedTuple):
    """Tokens [start, start + size) of a document."""

    document: int
    start: int
    size: int


def best_fit_decreasing(sizes: Sequence[int] | _Ints, *, capacity: int) -> _Ints:
    """Put items into as few rows as best fit finds.

    Args:    sizes: 1 to capacity each.
    Returns: the row of each item, rows numbered in the order of their opening. The longest item goes first, of equals
             the lower number; it goes into the fullest row that still has room for it, of equally full ones into the
             one opened first, and opens a row if none has room.
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    bits = len(sizes).bit_length()
    rows, placed = 0, []
    open_rows: list[int] = []  # free places, then number, in one integer; ascending: the first with room fits best
    for size in sizes[order].tolist():
        place = bisect_left(open_rows, size << bits)
        if place < len(open_rows):
            found = open_rows.pop(place) - (size << bits)
        else:
            found, rows = (capacity - size) << bits | rows, rows + 1
        placed.append(found)
        if found >> bits:
            insort(open_rows, found)
    row_of = np.empty(len(sizes), np.int64)
    row_of[order] = np.array(placed, np.int64) & ((1 << bits) - 1)
    return row_of


def pieces_of(documents: _Ints, lengths: _Ints, *, row_tokens: int) -> tuple[_Ints, _Ints, _Ints]:
    """Documents as pieces that fit into a row: document, start and size of each piece, in order; empty ones give none.

    Args:    lengths: of these documents.
    """
    counts = -(-lengths // row_tokens)
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = within * row_tokens
    return np.repeat(documents, counts), starts, np.minimum(np.repeat(lengths, counts) - starts, row_tokens)


class PackedDocuments:
    """Some documents in rows of at most `row_tokens` tokens, by best fit."""

    def __init__(self, documents: _Ints, lengths: _Ints, *, row_tokens: int) -> None:
        """Rows are in the order of their opening; `lengths` are those of these documents."""
        parts = pieces_of(documents, lengths, row_tokens=row_tokens)
        row_of = best_fit_decreasing(parts[2], capacity=row_tokens)
        by_row = np.lexsort((-parts[2], row_of))  # stable: as they were placed
        self._pieces = [part[by_row] for part in parts]
        self._ends = np.cumsum(np.bincount(row_of))  # pieces up to and with each row
        self.tokens = np.bincount(row_of, weights=parts[2]).astype(np.int64)  # of each row

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.tokens)

    def row(self, number: int) -> list[Piece]:
        """The pieces of a row, longest first."""
        part = slice(int(self._ends[number - 1]) if number else 0, int(self._ends[number]))
        return list(map(Piece, *(values[part].tolist() for values in self._pieces)))


@dataclass(frozen=True)
class _Block:
    number: int  # from the first epoch on
    packed: PackedDocuments
    order: _Ints  # of its rows
    tokens_before: _Ints  # in the block, before each row and after the last one


class BestFit:
    """The endless sequence of packed rows, one epoch after the other."""

    def __init__(self, lengths: _Ints, *, row_tokens: int, seed: int) -> None:
        """Nothing is packed yet; `lengths` holds at least one token."""
        self._lengths, self._row_tokens, self._seed = lengths, row_tokens, seed
        self._blocks_per_epoch = -(-len(lengths) // BLOCK_DOCUMENTS)
        # Rows and tokens before each block that was reached, and before the one after it.
        self._rows_before, self._tokens_before = array("q", [0]), array("q", [0])
        self._block: _Block | None = None
        self._epoch, self._order = -1, np.empty(0, np.int64)

    @property
    def documents_cut(self) -> int:
        """Documents of an epoch that are longer than a row."""
        return int((self._lengths > self._row_tokens).sum())

    @property
    def fill(self) -> float:
        """Share of the places that hold tokens, over the first blocks of the first epoch."""
        last = min(_FILL_BLOCKS, self._blocks_per_epoch) - 1
        while len(self._rows_before) <= last + 1:
            self._enter(len(self._rows_before) - 1)
        return self._tokens_before[last + 1] / (self._rows_before[last + 1] * self._row_tokens)

    def row(self, number: int) -> list[Piece]:
        """The pieces of one row."""
        block = self._enter(self._find(number))
        return block.packed.row(int(block.order[number - self._rows_before[block.number]]))

    def tokens_before(self, number: int) -> int:
        """Tokens in all rows before this one."""
        if number == 0:
            return 0
        block = self._enter(self._find(number - 1))  # of the last of them: no block is packed before it is needed
        return self._tokens_before[block.number] + int(block.tokens_before[number - self._rows_before[block.number]])

    def _find(self, number: int) -> int:
        """The block that holds a row; all before it are packed once, to know how many rows they are."""
        while self._rows_before[-1] <= number:
            self._enter(len(self._rows_before) - 1)
        return bisect_right(self._rows_before, number) - 1

    def _enter(self, number: int) -> _Block:
        if self._block is None or number != self._block.number:
            self._block = self._packed(number)
            if number == len(self._rows_before) - 1:
                self._rows_before.append(self._rows_before[-1] + len(self._block.order))
                self._tokens_before.append(self._tokens_before[-1] + int(self._block.tokens_before[-1]))
        return self._block

    def _packed(self, number: int) -> _Block:
        epoch, block = divmod(number, self._blocks_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, document_order(len(self._lengths), seed=self._seed, epoch=epoch)
        documents = self._order[block * BLOCK_DOCUMENTS : (block + 1) * BLOCK_DOCUMENTS]
        packed = PackedDocuments(documents, self._lengths[documents], row_tokens=self._row_tokens)
        order = row_order(len(packed), seed=self._seed, epoch=epoch, block=block)
        return _Block(number, packed, order, np.cumsum(np.append(0, packed.tokens[order])))
