"""Orthogonal matching pursuit, batched and exact: each target as a combination of a few rows of a dictionary.

Place in the path: the heart of the vocabulary transplant (recipe -> tensors). Semantics of mergekit's tokensurgeon: no
centring, atoms as they are (`unit_atoms` gives the textbook variant), least squares on the support after every step.

How it is fast and yet exact: a *screen* scores all atoms for all targets in a narrow type and carries a proven bound on
its own error. Atoms that the bound rules out are gone; of those left, float64 chooses (`omp_choice`). So the support is
that of float64 arithmetic whatever the device, the route, the make of processor and the number of threads.
Routes: on a GPU bfloat16 products and kernels (`omp_cuda`); on a CPU inner products of atoms, kept in float16
(`omp_gram`), or where those do not fit or pay, products of residuals and atoms (`omp_product`).

Legend: B targets, N atoms, D width, K atoms a target.

Invariants: of equal scores the lowest index wins; a target whose residual falls to `EXACT` of its norm, or that is
orthogonal to every atom, gets no more atoms (support -1, coefficient 0).

Example:
    >>> Dictionary(torch.eye(4)).solve(torch.tensor([[0.0, 3.0, 0.0, 1.0]]), atoms=2).support_BK
    tensor([[1, 3]])
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from recipes.ops.omp_choice import Tally, choose
from recipes.ops.omp_cuda import CardScreen
from recipes.ops.omp_gram import GramScreen, table_bytes
from recipes.ops.omp_product import ProductScreen, best_dtype
from recipes.ops.omp_state import Atoms, extend, lengths, residual, start
from recipes.ops.parallel import over_rows
from vpstore.errors import RecipeRefused, ShapeMismatch

_GRAM_BYTES: Final = 5 << 30  # a larger table is not kept
_STATE_BYTES: Final = 1 << 29  # chosen rows of the targets that one thread solves at a time
_ROWS: Final = 1024  # targets that one thread solves at a time, at most
_ROWS_LEAST: Final = 128  # fewer do not pay for the screen's small operations
_CHECKED: Final = 8192  # rows that are looked at at a time

_Part = tuple[Tensor, Tensor, Tensor]  # support, coefficients, residual of some targets


@dataclass(frozen=True)
class Solution:
    """Which atoms make up each target, in the order of their choice."""

    support_BK: Tensor  # int64, -1 where a target needed fewer
    coefficients_BK: Tensor  # float64, 0 there
    residual_B: Tensor  # float64, |target - combination| / |target|; 0 for a zero target
    tally: Tally  # how the choices were made


class Dictionary:
    """Atoms, prepared once for many targets."""

    def __init__(
        self,
        atoms_ND: Tensor,
        *,
        unit_atoms: bool = False,
        use_gram: bool | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        """Prepare the atoms.

        Args:    atoms_ND: rows; computed with in float32.
                 unit_atoms: choose by angle, not by inner product; coefficients still refer to the rows given.
                 use_gram: which screen on a CPU; None: by the table's size and how many targets there are to solve.
                 It does not change the result.
                 device: where to compute; None: where the atoms lie. A GPU need not have room for them: `route` says
                 what it got.
        Raises:  ShapeMismatch: not a matrix with at least one row.
                 RecipeRefused: an element is infinite or no number.
        """
        if atoms_ND.ndim != 2 or atoms_ND.shape[0] == 0:
            raise ShapeMismatch("a dictionary is a matrix of atoms", expected="[N, D]", found=str(list(atoms_ND.shape)))
        _refuse_not_finite(atoms_ND, "an atom")
        self.scale_N = torch.ones(atoms_ND.shape[0], dtype=torch.float64, device=atoms_ND.device)
        self.atoms_ND = atoms_ND.float().contiguous()
        if unit_atoms:
            norms_N = lengths(atoms_ND)
            self.scale_N = torch.where(norms_N > 0, 1.0 / norms_N, 1.0)
            self.atoms_ND = (atoms_ND.double() * self.scale_N[:, None]).float().contiguous()
        self.norms_N = lengths(self.atoms_ND)
        self.width = self.atoms_ND.shape[1]
        largest = float(self.norms_N.max())
        self._scale = 2.0 ** -math.frexp(largest)[1] if largest > 0 else 1.0
        self._use_gram = use_gram
        self._gram: GramScreen | None = None
        self._product: ProductScreen | None = None
        self._device = torch.device(device) if device is not None else self.atoms_ND.device
        self._card: CardScreen | None = None
        if self._device.type == "cuda":
            here = torch.empty(0, device=self._device).device  # with its number
            self._card = CardScreen(Atoms(self.atoms_ND, self.norms_N), self._scale, here)

    @property
    def route(self) -> str:
        """In words: where the targets are solved, and what of the atoms lies elsewhere."""
        return "cpu" if self._card is None else self._card.route

    def solve(self, targets_BD: Tensor, *, atoms: int) -> Solution:
        """Combine at most `atoms` rows of the dictionary into each target.

        Args:    targets_BD: any float dtype; taken as float32 values.
        Returns: supports in the order of choice, least-squares coefficients, relative residuals.
        Raises:  ShapeMismatch: another width than the dictionary's, or more atoms than it has.
                 RecipeRefused: an element is infinite or no number.
        Source:  Pati et al. 1993; semantics of arcee-ai/mergekit `batch_omp`; Rubinstein et al. 2008 (Batch-OMP).
        """
        if targets_BD.ndim != 2 or targets_BD.shape[1] != self.width or not 0 < atoms <= self.atoms_ND.shape[0]:
            raise ShapeMismatch(
                "targets do not fit the dictionary",
                expected=f"[B, {self.width}] and 1..{self.atoms_ND.shape[0]} atoms",
                found=f"{list(targets_BD.shape)} and {atoms} atoms",
            )
        _refuse_not_finite(targets_BD, "a target")
        solve = self._solve_here if self._card is None else self._solve_on_card
        with _exact_products():
            parts, tally = solve(targets_BD, atoms)
        support_BK, coefficients_BK, residual_B = (torch.cat(column) for column in zip(*parts, strict=True))
        scale_BK = self.scale_N.to(support_BK.device)[support_BK.clamp(min=0)]
        return Solution(support_BK, coefficients_BK * scale_BK, residual_B, tally)

    def _solve_on_card(self, targets_BD: Tensor, atoms: int) -> tuple[list[_Part], Tally]:
        assert self._card is not None
        tally, parts = Tally(), []
        rows = self._card.rows(len(targets_BD), atoms)
        for first in range(0, max(1, len(targets_BD)), rows):
            parts.append(self._card.solve(targets_BD[first : first + rows], atoms, tally))
        return parts, tally

    def _solve_here(self, targets_BD: Tensor, atoms: int) -> tuple[list[_Part], Tally]:
        tally = Tally()
        screen, targets_BD = self._screen(len(targets_BD), atoms), targets_BD.to(self.atoms_ND.device)
        found = over_rows(
            lambda begin, end: self._solve(screen, targets_BD[begin:end], atoms),
            len(targets_BD),
            self._rows(len(targets_BD), atoms),
        )
        for _, made in found:
            tally.add(made)
        return [part for part, _ in found] or [self._solve(screen, targets_BD, atoms)[0]], tally

    def _rows(self, targets: int, atoms: int) -> int:
        """Targets a block: by their number and size alone, so that a cut does not depend on the machine."""
        fitting = max(1, _STATE_BYTES // (8 * atoms * self.width))
        return min(_ROWS, fitting, max(_ROWS_LEAST, -(-targets // 4)))

    def _screen(self, targets: int, atoms: int) -> GramScreen | ProductScreen:
        """Made when it is needed, kept for the next targets."""
        count, use_gram = len(self.atoms_ND), self._use_gram
        if use_gram is None and best_dtype() == torch.bfloat16:
            use_gram = (
                False  # on two cores that multiply bfloat16, as fast as a table or faster, and nothing to prepare
            )
        elif use_gram is None:
            # A table takes N inner products for each atom, a product screen `atoms` times N for each target.
            use_gram = self._gram is not None or 2 * targets * atoms >= count
            use_gram &= table_bytes(count) <= _GRAM_BYTES and 2.0**-40 < self._scale < 2.0**40  # in float32's range
        if use_gram:
            largest_block = min(_ROWS, max(1, _STATE_BYTES // (8 * atoms * self.width)))
            if self._gram is None or self._gram.rows < largest_block:
                blocks = max(1, torch.get_num_threads())
                self._gram = GramScreen(self.atoms_ND, self._scale, rows=largest_block, blocks=blocks)
            return self._gram
        if self._product is None:
            self._product = ProductScreen(self.atoms_ND, self._scale, dtype=best_dtype())
        return self._product

    def _solve(self, screen: GramScreen | ProductScreen, targets_BD: Tensor, atoms: int) -> tuple[_Part, Tally]:
        state, tally = start(targets_BD, atoms), Tally()
        known = Atoms(self.atoms_ND, self.norms_N)
        with screen.block(state) as view:
            for step in range(atoms):
                chosen_B, is_found_B, made = choose(state, step, screen, view, known)
                tally.add(made)
                state.is_open_B &= is_found_B
                if not bool(state.is_open_B.any()):
                    break
                extend(state, step, chosen_B, self.atoms_ND)
        safe_B = torch.where(state.norm_B > 0, state.norm_B, 1.0)
        residual_B = residual(state, atoms, slice(None)).norm(dim=1) / safe_B
        return (state.support_BK, state.coefficients_BK, residual_B), tally


def cpu_bytes(count: int, width: int) -> int:
    """What a dictionary of so many atoms takes at most where a CPU solves: the atoms, a screen, targets under way."""
    table = table_bytes(count)
    screen = table if table <= _GRAM_BYTES else 2 * count * width
    return 4 * count * width + screen + 2 * _STATE_BYTES


def _refuse_not_finite(rows_ND: Tensor, what: str) -> None:
    """Infinity and NaN have no place in a least-squares fit; nor has what float32 cannot hold."""
    for first in range(0, len(rows_ND), _CHECKED):
        is_bad_R = ~rows_ND[first : first + _CHECKED].float().isfinite().all(1)
        if bool(is_bad_R.any()):
            raise RecipeRefused(
                f"{what} is not finite",
                where=f"row {first + int(is_bad_R.nonzero()[0, 0])}",
                expected="finite float32 values",
                found="infinity or NaN",
                next_step="look at the matrix that the row comes from",
            )


@contextmanager
def _exact_products() -> Iterator[None]:
    """Products in the type asked for and sums in float32: the bounds are about those. What was set comes back."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation")
    precision, flags = torch.get_float32_matmul_precision(), [getattr(matmul, name) for name in names]
    torch.set_float32_matmul_precision("highest")
    for name in names:
        setattr(matmul, name, False)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for name, flag in zip(names, flags, strict=True):
            setattr(matmul, name, flag)
