"""The product screen of orthogonal matching pursuit: scores by a matrix product of residuals and atoms, on a CPU.

Place in the path: below `recipes.ops.omp`, where a Gram matrix does not fit or does not pay. The product is in bfloat16
where the processor multiplies that and the process lets it, in float32 elsewhere.

Legend: B targets, P pairs of a target and a slice, N atoms, D width, J slices, W slice width.

Invariants: what rounding to the screen's dtype loses of a residual and of an atom is measured, not bounded; only the
sums of the product are bounded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

from recipes.ops.omp_state import EXACT, Look, State, residual

WIDTH: Final = 64  # atoms a slice
# What a sum of products may lose for each term, of the product of the lengths. A float32 unit and AMX round to nearest:
# 2^-24. A tensor core cuts 16 aligned products and the sum so far below 2^-24 of the largest: 17/16 of 2^-24 a term.
SUM_UNIT: Final = 2.0**-23


def best_dtype() -> torch.dtype:
    """bfloat16 where oneDNN may use units for it, by what the processor and the process's settings say."""
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "DEFAULT")).upper()
    is_allowed = allowed in ("DEFAULT", "ALL") or "AMX" in allowed or "BF16" in allowed
    has_units = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if is_allowed and has_units else torch.float32


def rounded_atoms(atoms_ND: Tensor, scale: float, out_ND: Tensor) -> tuple[Tensor, float]:
    """Bring atoms to a length of at most one and round them to the screen's dtype, into `out_ND`.

    Args:    scale: a power of two; out_ND: may have more rows, and lie on another device.
    Returns: lengths [N], float32, never too small; and the `spread`: an atom's rounding and the sums of a product put
             a score off by at most `spread` times that length times the length of the rounded residual.
    """
    count, width = atoms_ND.shape
    norm_N = torch.empty(count, dtype=torch.float64, device=out_ND.device)
    lost_N = torch.empty_like(norm_N)
    for first in range(0, count, 8192):
        span = slice(first, min(first + 8192, count))
        exact_RD = atoms_ND[span].to(out_ND.device).double() * scale
        out_ND[span] = exact_RD
        norm_N[span] = exact_RD.norm(dim=1)
        lost_N[span] = (exact_RD - out_ND[span].double()).norm(dim=1)
    # An atom so short that its elements leave the range of the dtype loses more for its length: it counts as longer.
    is_long_N = norm_N >= norm_N.max() / 64
    share = max(float((lost_N / norm_N.clamp(min=1e-300))[is_long_N].max()), 2.0**-30)
    norm_N = torch.maximum(norm_N, lost_N / share).clamp(min=1e-30) * (1 + 2.0**-20)
    return norm_N.float(), share + SUM_UNIT * (width + 4) * (1 + share)


class ProductScreen:
    """Atoms rounded once for many targets."""

    width = WIDTH

    def __init__(self, atoms_ND: Tensor, scale: float, *, dtype: torch.dtype) -> None:
        """Round the atoms.

        Args:    scale: a power of two that brings the longest atom to a length between a half and one.
        """
        self.scale, count = scale, len(atoms_ND)
        self.screen_ND = torch.zeros(count + -count % WIDTH, atoms_ND.shape[1], dtype=dtype)
        norm_N, self.spread = rounded_atoms(atoms_ND, scale, self.screen_ND)
        self.norm_J = torch.nn.functional.pad(norm_N, (0, -count % WIDTH)).view(-1, WIDTH).amax(1)
        self.relative = 1.01 * 2.0**-8 if dtype == torch.bfloat16 else 2.0**-21

    @contextmanager
    def block(self, state: State) -> Iterator[ProductBlock]:
        """The view of a block of targets."""
        yield ProductBlock(self, state)


class ProductBlock:
    """One block of targets under the screen."""

    def __init__(self, screen: ProductScreen, state: State) -> None:
        self._screen = screen
        self._score_NB = torch.empty(len(screen.screen_ND), len(state.norm_B), dtype=screen.screen_ND.dtype)

    def look(self, state: State, step: int) -> Look:
        """The scores of all atoms, by one product."""
        residual_BD = residual(state, step, slice(None))
        length_B = residual_BD.norm(dim=1)
        unit_BD = residual_BD / torch.where(length_B > 0, length_B, 1.0)[:, None]
        rounded_BD = unit_BD.to(self._score_NB.dtype)
        torch.mm(self._screen.screen_ND, rounded_BD.T, out=self._score_NB)
        exact_BD = rounded_BD.double()
        error_B = 1.001 * ((unit_BD - exact_BD).norm(dim=1) + self._screen.spread * exact_BD.norm(dim=1))
        # Without its sign, a float is in the order of its bits, and whole numbers are compared faster.
        short = self._score_NB.dtype == torch.bfloat16
        bits_NB = self._score_NB.view(torch.int16 if short else torch.int32).bitwise_and_(
            0x7FFF if short else 0x7FFFFFFF
        )
        best_JB = torch.unflatten(bits_NB, 0, (-1, WIDTH)).amax(1).view(self._score_NB.dtype).float()
        # A chosen atom's lower bound is below zero, so whatever exceeds zero is an atom; and more than rounding.
        unit_B = self._screen.scale / torch.where(length_B > 0, length_B, 1.0)
        return Look(best_JB, error_B, torch.full_like(error_B, 1.01 * EXACT), unit_B, residual_BD)

    def scores(self, row_P: Tensor, slice_P: Tensor) -> Tensor:
        """All scores [P, W] of some targets in some slices, float32."""
        score_JWB = torch.unflatten(self._score_NB, 0, (-1, WIDTH))
        return score_JWB[slice_P, :, row_P].float()
