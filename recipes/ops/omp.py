"""Orthogonal matching pursuit, batched and exact: each target as a combination of a few rows of a dictionary.

Place in the path: the heart of the vocabulary transplant (recipe -> tensors). Semantics of mergekit's tokensurgeon: no
centring, atoms as they are (`unit_atoms` gives the textbook variant), least squares on the support after every step.

How it is fast and yet exact: a float32 *screen* scores all atoms for all targets and carries a proven bound on its own
rounding error. If one atom leads by more than the bound, it is the one float64 arithmetic would choose; otherwise the
atoms within the bound are scored again in float64, and if even the shortlist does not hold them all, every atom is.
So the support is that of the float64 reference whatever the device, the route and the number of threads.
Two screens: `gram` keeps all inner products of atoms, sliced so that a slice stays in a core's cache, and pays s
instead of D multiplications an atom in step s; `product` multiplies residuals by atoms (bfloat16 on CUDA).

Legend: B targets, R some of them, N atoms, D width, K atoms a target, S chosen so far, C shortlist, W slice width,
J slices.

Invariants: of equal scores the lowest index wins; a target whose residual falls to `_EXACT` of its norm, or that is
orthogonal to every atom, gets no more atoms (support -1, coefficient 0).

Example:
    >>> Dictionary(torch.eye(4)).solve(torch.tensor([[0.0, 3.0, 0.0, 1.0]]), atoms=2).support_BK
    tensor([[1, 3]])
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.ops.parallel import over_rows
from recipes.ops.roots import square_root
from vpstore.errors import ShapeMismatch

_SLICE = 64  # atoms a slice: a [8192, 64] float32 slice of the Gram matrix is 2 MB
_SHORTLIST = 16
_EXACT = 1e-6  # residual over target norm below which a target counts as reached
_UNIT, _UNIT_BF16 = 2.0**-24, 2.0**-9  # unit roundoff of float32 and of bfloat16
_GRAM_BYTES = 2 << 30  # a larger Gram matrix is not kept; the route does not change the result
_ROWS = 8192  # targets that one thread solves at a time, at most
_WIDE = 256  # rows whose products with all atoms are made at a time
_SETTLED = 512  # targets whose choice is settled in float64 at a time
_SCORES = 1 << 26  # scores that are held at a time where a screen needs all of a target's at once


@dataclass(frozen=True)
class Solution:
    """Which atoms make up each target, in the order of their choice."""

    support_BK: Tensor  # int64, -1 where a target needed fewer
    coefficients_BK: Tensor  # float64, 0 there
    residual_B: Tensor  # float64, |target - combination| / |target|; 0 for a zero target


@dataclass
class _State:
    """A block of targets on its way through the steps, in float64."""

    target_BD: Tensor
    norm_B: Tensor
    support_BK: Tensor
    coefficients_BK: Tensor
    atoms_BKD: Tensor  # the chosen rows
    inverse_BKK: Tensor  # columns t: atoms^T t are the Gram-Schmidt basis
    left_B: Tensor  # squared norm of the residual
    is_open_B: Tensor


class Dictionary:
    """Atoms, prepared once for many targets."""

    def __init__(self, atoms_ND: Tensor, *, unit_atoms: bool = False, use_gram: bool | None = None) -> None:
        """Prepare the atoms.

        Args:    atoms_ND: rows; computed with in float32, on the device they lie on.
                 unit_atoms: choose by angle, not by inner product; coefficients still refer to the rows given.
                 use_gram: which screen; None: by the size of the Gram matrix. It does not change the result.
        Raises:  ShapeMismatch: not a matrix with at least one row.
        """
        if atoms_ND.ndim != 2 or atoms_ND.shape[0] == 0:
            raise ShapeMismatch("a dictionary is a matrix of atoms", expected="[N, D]", found=str(list(atoms_ND.shape)))
        self.scale_N = torch.ones(atoms_ND.shape[0], dtype=torch.float64, device=atoms_ND.device)
        if unit_atoms:
            norms_N = atoms_ND.double().norm(dim=1)
            self.scale_N = torch.where(norms_N > 0, 1.0 / norms_N, 1.0)
        self.atoms_ND = (atoms_ND.double() * self.scale_N[:, None]).float().contiguous()
        count, self.width = self.atoms_ND.shape
        self.norms_N = self.atoms_ND.double().norm(dim=1)
        self.largest = float(self.norms_N.max())
        self._padded = F.pad(self.atoms_ND, (0, 0, 0, -count % _SLICE))  # zero atoms are never chosen
        fits = 4 * count * self._padded.shape[0] <= _GRAM_BYTES and not atoms_ND.is_cuda
        self.gram_JNW: Tensor | None = None
        if fits if use_gram is None else use_gram:
            self.gram_JNW = self._slices(self.atoms_ND, self.atoms_ND.new_empty(self._layout(count)))
        self._local = threading.local()
        self.screen_dtype = torch.bfloat16 if atoms_ND.is_cuda else torch.float32
        self._screen_ND = self.atoms_ND.to(self.screen_dtype)

    def solve(self, targets_BD: Tensor, *, atoms: int) -> Solution:
        """Combine at most `atoms` rows of the dictionary into each target.

        Args:    targets_BD: any float dtype; taken as float32 values.
        Returns: supports in the order of choice, least-squares coefficients, relative residuals.
        Raises:  ShapeMismatch: another width than the dictionary's, or more atoms than it has.
        Source:  Pati et al. 1993; semantics of arcee-ai/mergekit `batch_omp`; Rubinstein et al. 2008 (Batch-OMP).
        """
        if targets_BD.ndim != 2 or targets_BD.shape[1] != self.width or not 0 < atoms <= self.atoms_ND.shape[0]:
            raise ShapeMismatch(
                "targets do not fit the dictionary",
                expected=f"[B, {self.width}] and 1..{self.atoms_ND.shape[0]} atoms",
                found=f"{list(targets_BD.shape)} and {atoms} atoms",
            )
        rows = _ROWS if self.gram_JNW is not None else min(_ROWS, max(64, _SCORES // len(self.atoms_ND)))
        parts = over_rows(lambda start, stop: self._solve(targets_BD[start:stop], atoms), len(targets_BD), rows)
        if not parts:
            parts = [self._solve(targets_BD, atoms)]
        return Solution(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _solve(self, targets_BD: Tensor, atoms: int) -> tuple[Tensor, Tensor, Tensor]:
        state = _start(targets_BD, atoms)
        table_JXW = self._table(targets_BD.float()) if self.gram_JNW is not None else None
        for step in range(atoms):
            chosen_B, is_found_B = self._choose(state, step, table_JXW)
            state.is_open_B &= is_found_B
            if not bool(state.is_open_B.any()):
                break
            _extend(state, step, chosen_B, self.atoms_ND)
        scale_BK = self.scale_N[state.support_BK.clamp(min=0)]
        safe_B = torch.where(state.norm_B > 0, state.norm_B, 1.0)
        residual_B = _residual(state, atoms, slice(None)).norm(dim=1) / safe_B
        return state.support_BK, state.coefficients_BK * scale_BK, residual_B

    def _layout(self, rows: int) -> tuple[int, int, int]:
        return len(self._padded) // _SLICE, rows, _SLICE

    def _table(self, targets_BD: Tensor) -> Tensor:
        """Inner products with a slice's atoms: of all atoms, and below them of the targets. Reused by its thread."""
        assert self.gram_JNW is not None
        count = self.gram_JNW.shape[1]
        needed = count + len(targets_BD)
        table_JXW: Tensor | None = getattr(self._local, "table", None)
        if table_JXW is None or table_JXW.shape[1] < needed:
            table_JXW = self.gram_JNW.new_empty(self._layout(needed))
            table_JXW[:, :count] = self.gram_JNW
            self._local.table = table_JXW
        self._slices(targets_BD, table_JXW[:, count:needed])
        return table_JXW

    def _slices(self, rows_BD: Tensor, out_JBW: Tensor) -> Tensor:
        """Inner products of rows with all atoms, one slice of atoms after the other, written to `out_JBW`."""
        # Wide products, then a copy: a product for each slice alone runs at a fraction of the speed.
        for start in range(0, len(rows_BD), _WIDE):
            part = slice(start, start + _WIDE)
            product_BN = rows_BD[part] @ self._padded.T
            out_JBW[:, part] = torch.unflatten(product_BN, 1, (-1, _SLICE)).transpose(0, 1)
        return out_JBW

    def _choose(self, state: _State, step: int, table_JXW: Tensor | None) -> tuple[Tensor, Tensor]:
        """The next atom of each target, and whether it has one."""
        if table_JXW is not None:
            best_B, second_B, chosen_B = self._screen_gram(state, step, table_JXW)
            bound_B = self._gram_bound(state, step)
        else:
            residual_BD = _residual(state, step, slice(None))
            best_B, second_B, chosen_B = self._screen_product(residual_BD)
            bound_B = self._product_bound(residual_BD, self.screen_dtype)
        is_found_B = torch.ones_like(state.is_open_B)
        # Also when even the leader may be zero: then it is float64's to say whether any atom is left.
        is_close_B = state.is_open_B & ((second_B >= best_B - 2 * bound_B) | (best_B <= 2 * bound_B))
        rows_B = is_close_B.nonzero()[:, 0]
        for start in range(0, len(rows_B), _SETTLED):
            rows_R = rows_B[start : start + _SETTLED]
            chosen_B[rows_R], is_found_B[rows_R] = self._settle(state, step, rows_R)
        return chosen_B, is_found_B

    def _screen_gram(self, state: _State, step: int, table_JXW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of the residuals, each its target's minus its atoms': best, second best, which."""
        rows_B = torch.arange(len(state.support_BK), device=table_JXW.device)
        own_B1 = (len(self.atoms_ND) + rows_B)[:, None]
        index_BX = torch.cat([state.support_BK[:, :step].clamp(min=0), own_B1], 1).int()
        weight_BX = torch.cat([-state.coefficients_BK[:, :step], torch.ones_like(state.norm_B[:, None])], 1).float()
        best_JB = table_JXW.new_empty(len(table_JXW), len(rows_B))
        for out_B, table_XW in zip(best_JB, table_JXW, strict=True):
            torch.amax(_bag(index_BX, table_XW, weight_BX).abs_(), dim=1, out=out_B)
        _, slice_B = best_JB.max(dim=0)
        other_B = best_JB.scatter_(0, slice_B[None], -1.0).amax(0)
        flat_BX = index_BX + (slice_B * table_JXW.shape[1]).int()[:, None]
        score_BW = _bag(flat_BX, table_JXW.flatten(0, 1), weight_BX).abs_()
        best_B, at_B = score_BW.max(dim=1)
        second_B = torch.maximum(score_BW.scatter_(1, at_B[:, None], -1.0).amax(1), other_B)
        return best_B.double(), second_B.double(), slice_B * _SLICE + at_B

    def _screen_product(self, residual_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of the residuals by a matrix product, in the screen's dtype: best, second best, which."""
        score_BN = (residual_BD.to(self.screen_dtype) @ self._screen_ND.T).float().abs_()
        best_B, chosen_B = score_BN.max(dim=1)
        second_B = score_BN.scatter_(1, chosen_B[:, None], -1.0).amax(1)
        return best_B.double(), second_B.double(), chosen_B

    def _gram_bound(self, state: _State, step: int) -> Tensor:
        """How far a Gram score may be from the true one: the standard bound on the rounding of a sum of products."""
        norm_BS = self.norms_N[state.support_BK[:, :step].clamp(min=0)]
        summed_B = state.norm_B + (state.coefficients_BK[:, :step].abs() * norm_BS).sum(1)
        bound_B: Tensor = 1.01 * (self.width + step + 4) * _UNIT * self.largest * summed_B
        return bound_B

    def _product_bound(self, residual_BD: Tensor, dtype: torch.dtype) -> Tensor:
        """The same for a matrix product whose factors and result are rounded to `dtype`, summed in float32."""
        unit = (self.width + 2) * _UNIT + (3.03 * _UNIT_BF16 if dtype == torch.bfloat16 else 0.0)
        bound_B: Tensor = 1.01 * unit * self.largest * residual_BD.norm(dim=1)
        return bound_B

    def _settle(self, state: _State, step: int, rows_R: Tensor) -> tuple[Tensor, Tensor]:
        """Choose in float64: among a float32 shortlist if it provably holds the leader, else among all atoms."""
        residual_RD = _residual(state, step, rows_R)
        taken_RS = state.support_BK[rows_R, :step]
        listed = min(_SHORTLIST, len(self.atoms_ND) - 1)
        score_RN = (residual_RD.float() @ self.atoms_ND.T).abs_().scatter_(1, taken_RS.clamp(min=0), -1.0)
        value_RC, index_RC = score_RN.topk(listed + 1, dim=1)
        chosen_R, score_R = _rank(residual_RD, index_RC, taken_RS, self.atoms_ND)
        bound_R = self._product_bound(residual_RD, torch.float32)
        is_open_R = value_RC[:, -1] >= value_RC[:, 0] - 2 * bound_R
        every_N = torch.arange(len(self.atoms_ND), device=rows_R.device)
        for row in is_open_R.nonzero():
            chosen_R[row], score_R[row] = _rank(residual_RD[row], every_N[None], taken_RS[row], self.atoms_ND)
        floor_R = _EXACT * self.largest * residual_RD.norm(dim=1)
        return chosen_R, score_R > floor_R


def _start(targets_BD: Tensor, atoms: int) -> _State:
    target_BD = targets_BD.float().double()
    count, width = target_BD.shape
    squared_B = target_BD.square().sum(1)
    return _State(
        target_BD=target_BD,
        norm_B=square_root(squared_B),
        support_BK=torch.full((count, atoms), -1, dtype=torch.int64, device=target_BD.device),
        coefficients_BK=target_BD.new_zeros(count, atoms),
        atoms_BKD=target_BD.new_zeros(count, atoms, width),
        inverse_BKK=target_BD.new_zeros(count, atoms, atoms),
        left_B=squared_B.clone(),
        is_open_B=squared_B > 0,
    )


def _extend(state: _State, step: int, chosen_B: Tensor, atoms_ND: Tensor) -> None:
    """Take the chosen atoms into the supports: one Gram-Schmidt step, written in coefficients."""
    atom_BD = atoms_ND[chosen_B].double()
    earlier_BSD = state.atoms_BKD[:, :step]
    inner_BS = torch.bmm(earlier_BSD, atom_BD[:, :, None])[:, :, 0]
    inverse_BSS = state.inverse_BKK[:, :step, :step]
    along_BS = torch.bmm(inverse_BSS.mT, inner_BS[:, :, None])[:, :, 0]
    score_B = (atom_BD * state.target_BD).sum(1) - (inner_BS * state.coefficients_BK[:, :step]).sum(1)
    height_B = square_root((atom_BD.square().sum(1) - along_BS.square().sum(1)).clamp(min=1e-300))
    column_BS = -torch.bmm(inverse_BSS, along_BS[:, :, None])[:, :, 0] / height_B[:, None]
    gain_B = torch.where(state.is_open_B, score_B / height_B, 0.0)
    open_B1 = state.is_open_B[:, None]
    state.coefficients_BK[:, :step] += gain_B[:, None] * column_BS
    state.coefficients_BK[:, step] = gain_B / height_B
    state.inverse_BKK[:, :step, step] = torch.where(open_B1, column_BS, 0.0)
    state.inverse_BKK[:, step, step] = torch.where(state.is_open_B, 1.0 / height_B, 0.0)
    state.atoms_BKD[:, step] = torch.where(open_B1, atom_BD, 0.0)
    state.support_BK[:, step] = torch.where(state.is_open_B, chosen_B, -1)
    state.left_B -= gain_B.square()
    state.is_open_B &= state.left_B > (_EXACT * state.norm_B) ** 2


def _residual(state: _State, step: int, rows: Tensor | slice) -> Tensor:
    used_RSD, weight_RS = state.atoms_BKD[rows, :step], state.coefficients_BK[rows, :step]
    return state.target_BD[rows] - torch.einsum("rs,rsd->rd", weight_RS, used_RSD)


def _rank(residual_RD: Tensor, index_RC: Tensor, taken_RS: Tensor, atoms_ND: Tensor) -> tuple[Tensor, Tensor]:
    """The listed atom with the largest float64 score, and the score; of equal ones the lowest index.

    Sums of one fixed order, not a matrix product: equal atoms get equal scores wherever they stand.
    """
    index_RC = index_RC.sort(dim=1).values
    score_RC = (atoms_ND[index_RC].double() * residual_RD[:, None]).sum(2).abs()
    is_taken_RC = (index_RC[:, :, None] == taken_RS[:, None]).any(2)
    score_RC = score_RC.masked_fill(is_taken_RC, -1.0)
    best_R1 = score_RC.argmax(dim=1, keepdim=True)  # the first of equal ones
    return index_RC.gather(1, best_R1)[:, 0], score_RC.gather(1, best_R1)[:, 0]


def _bag(index_BS: Tensor, table_ND: Tensor, weight_BS: Tensor) -> Tensor:
    """Weighted sums of rows of a table."""
    return F.embedding_bag(index_BS, table_ND, per_sample_weights=weight_BS, mode="sum")
