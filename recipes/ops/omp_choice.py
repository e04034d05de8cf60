"""Which atom a step of orthogonal matching pursuit takes: what a screen proposes, proved or settled in float64.

Place in the path: screens (`omp_gram`, `omp_product`) -> **here** -> `omp_state`.

A screen gives scores and how far they may be off. The largest lower bound of any atom is a floor: an atom whose upper
bound stays below it cannot lead. Where one atom is left, it is the one that float64 arithmetic would choose; where a
few are, float64 ranks them; where too many are, or the floor is nothing but rounding, all atoms are looked at.

Legend: B targets, R some of them, P pairs of a target and a slice, Q pairs of a target and an atom, J slices, W slice
width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from recipes.ops.omp_state import EXACT, Atoms, Look, State, rank, residual, settle

_SLICES: Final = 512  # slices a target that are looked into
_LISTED: Final = 1024  # atoms a target that are ranked: more cost as much as a look at all


@dataclass
class Tally:
    """How the choices were made."""

    steps: int = 0  # choices: targets times steps, as long as a target was open
    ranked: int = 0  # of those, by float64 among the atoms that the screen left
    settled: int = 0  # of those, by a look at all atoms

    def add(self, other: Tally) -> None:
        """Count another block's choices too."""
        self.steps += other.steps
        self.ranked += other.ranked
        self.settled += other.settled


class Screen(Protocol):
    """What all screens have: unit roundoff of a score, and the longest atom of each slice."""

    relative: float
    width: int
    norm_J: Tensor


class View(Protocol):
    """A block of targets under a screen."""

    def look(self, state: State, step: int) -> Look:
        """Scores, and how far they may be off."""

    def scores(self, row_P: Tensor, slice_P: Tensor) -> Tensor:
        """All scores [P, W] of some targets in some slices, of the last look."""


def choose(state: State, step: int, screen: Screen, view: View, atoms: Atoms) -> tuple[Tensor, Tensor, Tally]:
    """The next atom of each target, and whether it has one."""
    look = view.look(state, step)
    reach_JB = _reach(screen, look.error_B)
    floor_B = (look.best_JB * (1 - screen.relative) - reach_JB).amax(0)
    is_sure_B = state.is_open_B & (floor_B > look.taken_B)
    row_P, slice_P = _hits(look.best_JB * (1 + screen.relative) + reach_JB >= floor_B, is_sure_B)
    row_Q, atom_Q, upper_Q = _listed(view.scores(row_P, slice_P), (row_P, slice_P), screen, look.error_B, floor_B)
    is_inside_Q = atom_Q < len(atoms.rows_ND)  # the last slice is filled up with nothing
    row_Q, atom_Q, upper_Q = row_Q[is_inside_Q], atom_Q[is_inside_Q], upper_Q[is_inside_Q]
    count_B = torch.bincount(row_Q, minlength=len(floor_B))
    is_sure_B &= (count_B > 0) & (count_B <= _LISTED)
    chosen_B = torch.zeros_like(count_B)
    chosen_B[row_Q] = atom_Q  # right for those with one, written over for all others
    is_found_B = is_sure_B.clone()
    ranked_R = (is_sure_B & (count_B > 1)).nonzero()[:, 0]
    settled_R = (state.is_open_B & ~is_sure_B).nonzero()[:, 0]
    if len(ranked_R) + len(settled_R):
        residual_BD = look.residual_BD if look.residual_BD is not None else residual(state, step, slice(None))
        is_ranked_Q = (is_sure_B & (count_B > 1))[row_Q]
        pairs = (row_Q[is_ranked_Q], atom_Q[is_ranked_Q])
        upper_Q = upper_Q[is_ranked_Q].double() / look.unit_B[pairs[0]]
        leader_B, _ = rank(residual_BD, pairs, state.support_BK[:, :step], atoms, upper_Q=upper_Q)
        chosen_B[ranked_R] = leader_B[ranked_R]
        chosen_B[settled_R], is_found_B[settled_R] = _settled(residual_BD, state.support_BK[:, :step], settled_R, atoms)
    return chosen_B, is_found_B, Tally(int(state.is_open_B.sum()), len(ranked_R), len(settled_R))


def _reach(screen: Screen, error_B: Tensor) -> Tensor:
    """How far a score of each slice may be off, rounded up."""
    return screen.norm_J[:, None] * (error_B * (1 + 2.0**-20)).float()


def _hits(is_hit_JB: Tensor, is_sure_B: Tensor) -> tuple[Tensor, Tensor]:
    """Targets and slices to look into; a target with too many is no longer sure."""
    is_sure_B &= is_hit_JB.sum(0) <= _SLICES
    slice_P, row_P = (is_hit_JB & is_sure_B).nonzero(as_tuple=True)
    return row_P, slice_P


def _listed(
    score_PW: Tensor, pairs: tuple[Tensor, Tensor], screen: Screen, error_B: Tensor, floor_B: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Targets and atoms whose upper bound reaches the floor, and that bound; sorted by target."""
    row_P, slice_P = pairs
    reach_P = screen.norm_J[slice_P] * (error_B * (1 + 2.0**-20)).float()[row_P]
    upper_PW = score_PW * (1 + screen.relative) + reach_P[:, None]
    pair_Q, place_Q = (upper_PW >= floor_B[row_P][:, None]).nonzero(as_tuple=True)
    upper_Q = upper_PW[pair_Q, place_Q]
    row_Q, atom_Q = row_P[pair_Q], slice_P[pair_Q] * screen.width + place_Q
    order_Q = row_Q.argsort(stable=True)
    return row_Q[order_Q], atom_Q[order_Q], upper_Q[order_Q]


def _settled(residual_BD: Tensor, taken_BS: Tensor, rows_R: Tensor, atoms: Atoms) -> tuple[Tensor, Tensor]:
    """By a look at all atoms: the choice, and whether its score is more than rounding."""
    residual_RD = residual_BD[rows_R]
    chosen_R, score_R = settle(residual_RD, taken_BS[rows_R], atoms)
    return chosen_R.clamp(min=0), score_R > EXACT * float(atoms.norm_N.max()) * residual_RD.norm(dim=1)
