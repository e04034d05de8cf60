"""The Gram screen of orthogonal matching pursuit: scores out of inner products of atoms, kept in float16.

Place in the path: below `recipes.ops.omp`, on a CPU. A step costs a target S + 1 numbers an atom instead of D. The
matrix lies in slices of atoms, so that what a thread gathers from stays near its core. Below the atoms' products lie
those of targets, and a score is one weighted sum of rows of a slice.

Legend: B targets, P pairs of a target and a slice, N atoms, D width, S chosen so far, J slices, W slice width, X rows
of the table.

Invariants: whatever the table, the weights and the sums are rounded to is in `error_B`, from the matrix as it was made:
a chosen atom contributes its largest product with any other, not the product of their norms.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.ops.omp_state import EXACT, Look, State, lengths

WIDTH: Final = 128  # atoms a slice
_WIDE: Final = 2 * WIDTH  # rows whose products with all atoms are made at a time
_DEPTH: Final = 512  # columns that one product sums; longer sums are put together from such
_HALF: Final = 2.0**-11  # unit roundoff of float16, ...
_TINY: Final = 2.0**-25  # ... what it is off below its normal numbers, ...
_UNIT: Final = 2.0**-24  # ... and unit roundoff of float32
_WEIGHT: Final = 30_000.0  # a weight that float16 holds


def table_bytes(atoms: int) -> int:
    """Size of the table for a dictionary, without the targets' part."""
    return 2 * atoms * (atoms + -atoms % WIDTH)


class GramScreen:
    """All inner products of atoms, and room below them for those of some blocks of targets."""

    relative = 2.0**-10  # what a score is rounded to, twice: float16
    width = WIDTH

    def __init__(self, atoms_ND: Tensor, scale: float, *, rows: int, blocks: int) -> None:
        """Multiply all atoms by all.

        Args:    scale: a power of two that brings the longest atom to a length between a half and one.
                 rows: targets a block, at most; blocks: how many are screened at a time.
        """
        self._atoms_ND, self.scale, self.rows = atoms_ND, scale, rows
        count, depth = atoms_ND.shape
        self.norm_N = lengths(atoms_ND) * scale
        self.norm_J = torch.ones(
            -(-count // WIDTH)
        )  # how far a score may be off is no matter of its atom's length here
        pieces = -(-depth // _DEPTH)
        self._product_unit = 1.01 * (min(depth, _DEPTH) + pieces + 4) * _UNIT
        self._table_JXW = torch.zeros(len(self.norm_J), count + rows * blocks, WIDTH, dtype=torch.float16)
        self.cross_N = torch.zeros(count)
        self._fill()
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for block in range(blocks):
            self._free.put(count + rows * block)

    def _fill(self) -> None:
        """Products with later atoms, written on both sides of the diagonal."""
        count = len(self._atoms_ND)
        for first in range(0, count, _WIDE):
            part_RD = self._atoms_ND[first : first + _WIDE] * self.scale
            product_RM = self._products(part_RD, first)
            stop = first + len(part_RD)
            self._put(product_RM, slice(first, stop), first // WIDTH)
            for slot in range(first, stop, WIDTH):
                mirrored = product_RM[slot - first : slot - first + WIDTH, len(part_RD) :].T
                self._table_JXW[slot // WIDTH, stop:count, : mirrored.shape[1]] = mirrored
            size_RM = product_RM.abs_()
            size_RM.fill_diagonal_(0.0)
            torch.maximum(self.cross_N[first:stop], size_RM.amax(1), out=self.cross_N[first:stop])
            torch.maximum(self.cross_N[first:], size_RM.amax(0), out=self.cross_N[first:])

    def _products(self, rows_RD: Tensor, first: int = 0) -> Tensor:
        """Inner products with the atoms from `first` on, in float32, in pieces of the width."""
        total_RM = None
        for start in range(0, rows_RD.shape[1], _DEPTH):
            span = slice(start, start + _DEPTH)
            piece_RM = (rows_RD[:, span] * self.scale) @ self._atoms_ND[first:, span].T
            total_RM = piece_RM if total_RM is None else total_RM.add_(piece_RM)
        assert total_RM is not None
        return total_RM

    def _put(self, product_RM: Tensor, rows: slice, first: int) -> None:
        """Write products with consecutive atoms into the table, from slice `first` on."""
        whole = product_RM.shape[1] // WIDTH
        cut = torch.unflatten(product_RM[:, : whole * WIDTH], 1, (whole, WIDTH)).transpose(0, 1)
        self._table_JXW[first : first + whole, rows] = cut
        if rest := product_RM.shape[1] - whole * WIDTH:
            self._table_JXW[first + whole, rows, :rest] = product_RM[:, whole * WIDTH :]

    @contextmanager
    def block(self, state: State) -> Iterator[GramBlock]:
        """The view of a block of targets."""
        first = self._free.get()
        try:
            yield GramBlock(self, state, first)
        finally:
            self._free.put(first)


class GramBlock:
    """One block of targets under the screen."""

    def __init__(self, screen: GramScreen, state: State, first: int) -> None:
        self._screen, self._table_JXW = screen, screen._table_JXW
        self._norm_B = torch.where(state.norm_B > 0, state.norm_B, 1.0)
        self._own_B = first + torch.arange(len(self._norm_B))
        unit_BD = (state.target_BD / self._norm_B[:, None]).float()
        self._cross_B = torch.zeros(len(unit_BD))
        for start in range(0, len(unit_BD), _WIDE):
            span = slice(start, start + _WIDE)
            product_RN = screen._products(unit_BD[span])
            self._cross_B[span] = product_RN.abs().amax(1)
            screen._put(product_RN, slice(first + start, first + start + len(product_RN)), 0)

    def look(self, state: State, step: int) -> Look:
        """The scores of all atoms, slice after slice."""
        index_BS = state.support_BK[:, :step].clamp(min=0)
        weight_BS = -state.coefficients_BK[:, :step] / (self._norm_B * self._screen.scale)[:, None]
        self._index_BX = torch.cat([index_BS, self._own_B[:, None]], 1).int()
        self._weight_BX = torch.cat([weight_BS, torch.ones_like(self._norm_B)[:, None]], 1).half()
        best_JB = torch.empty(len(self._table_JXW), len(index_BS), dtype=torch.int16)
        for out_B, table_XW in zip(best_JB, self._table_JXW, strict=True):
            # Without its sign, a float16 is in the order of its bits: whole numbers are compared much faster.
            bits_BW = _bag(self._index_BX, table_XW, self._weight_BX).view(torch.int16).bitwise_and_(0x7FFF)
            torch.amax(bits_BW, dim=1, out=out_B)
        error_B, taken_B = self._errors(index_BS, weight_BS.abs())
        return Look(best_JB.view(torch.float16).float(), error_B, taken_B, self._screen.scale / self._norm_B, None)

    def _errors(self, index_BS: Tensor, weight_BS: Tensor) -> tuple[Tensor, Tensor]:
        screen = self._screen
        longest = float(screen.norm_N.max())
        norm_BS, cross_BS = screen.norm_N[index_BS], screen.cross_N[index_BS].double()
        summed_B = (weight_BS * cross_BS).sum(1) + self._cross_B
        sums = 1.01 * (index_BS.shape[1] + 3) * _UNIT * summed_B
        products = screen._product_unit * longest * ((weight_BS * norm_BS).sum(1) + 1.0) + 2 * _UNIT * longest
        entries = _HALF * summed_B + _TINY * (weight_BS.sum(1) + 1.0)
        weights = (cross_BS * (1.01 * _HALF * weight_BS + _TINY)).sum(1)
        error_B = 1.01 * (sums + products + entries + weights) + 2 * _TINY
        # A chosen atom's own product is its squared length: rounding may leave that much of a score that is zero.
        own_B = (norm_BS.square() * (2.03 * _HALF * weight_BS + 2 * _TINY)).sum(1)
        largest_B = torch.cat([weight_BS, torch.zeros_like(self._norm_B)[:, None]], 1).amax(1)
        error_B = torch.where(largest_B < _WEIGHT, error_B, torch.inf)
        return error_B, 2 * error_B + 1.01 * own_B + 1.01 * EXACT * longest

    def scores(self, row_P: Tensor, slice_P: Tensor) -> Tensor:
        """All scores [P, W] of some targets in some slices, float32."""
        flat_PX = self._index_BX[row_P] + (slice_P * self._table_JXW.shape[1])[:, None].int()
        return _bag(flat_PX, self._table_JXW.flatten(0, 1), self._weight_BX[row_P]).float().abs_()


def _bag(index_BS: Tensor, table_XW: Tensor, weight_BS: Tensor) -> Tensor:
    """Weighted sums of rows of a table."""
    return F.embedding_bag(index_BS, table_XW, per_sample_weights=weight_BS, mode="sum")
