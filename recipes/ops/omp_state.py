"""Targets on their way through orthogonal matching pursuit, in float64, on a CPU.

Place in the path: below `recipes.ops.omp_choice`. A step takes one atom into each support and solves the least squares
anew, written in coefficients: no residual is kept, and none is rounded twice.

Legend: B targets, R some of them, Q pairs of a target and an atom, N atoms, D width, K atoms a target, S chosen so far.

Invariants: `rank` scores by sums of one fixed order, so equal atoms get equal scores wherever they stand, and of equal
scores the lowest index wins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.ops.roots import square_root

EXACT = 1e-6  # residual over target norm below which a target counts as reached
_UNIT = 2.0**-24  # unit roundoff of float32
_PAIRS = 512  # atoms that are scored in float64 at a time
_GROUP = 8  # atoms that one residual is multiplied with at a time, where it has many
_GATHERED = 256  # atoms that are gathered at a time: few enough to stay near a core
_ROWS = 8192  # rows that are widened to float64 at a time
_SCORES = 1 << 22  # float32 scores that are held at a time, any number of which may have to be ranked


@dataclass
class State:
    """A block of targets."""

    target_BD: Tensor
    norm_B: Tensor
    support_BK: Tensor
    coefficients_BK: Tensor
    atoms_BKD: Tensor  # the chosen rows
    inverse_BKK: Tensor  # columns t: atoms^T t are the Gram-Schmidt basis
    left_B: Tensor  # squared norm of the residual
    is_open_B: Tensor


@dataclass(frozen=True)
class Atoms:
    """The dictionary's rows, and their lengths in float64."""

    rows_ND: Tensor
    norm_N: Tensor


@dataclass(frozen=True)
class Look:
    """What a screen says at one step, in its own unit: any that does not change which score is the largest."""

    best_JB: Tensor  # float32, the largest score of each slice of atoms
    error_B: Tensor  # float64: how far a score may be off, besides its own rounding
    taken_B: Tensor  # float64: a lower bound above this is that of an atom, not yet taken and not mere rounding
    unit_B: Tensor  # float64: this, for a true score of one
    residual_BD: Tensor | None  # where the screen made it


def lengths(rows_ND: Tensor) -> Tensor:
    """Norms of rows in float64, without a float64 copy of everything."""
    norm_N = torch.empty(len(rows_ND), dtype=torch.float64, device=rows_ND.device)
    for first in range(0, len(rows_ND), _ROWS):
        norm_N[first : first + _ROWS] = rows_ND[first : first + _ROWS].double().norm(dim=1)
    return norm_N


def start(targets_BD: Tensor, atoms: int) -> State:
    """No atom chosen yet; a zero target is done."""
    target_BD = targets_BD.float().double()
    count, width = target_BD.shape
    squared_B = target_BD.square().sum(1)
    return State(
        target_BD=target_BD,
        norm_B=square_root(squared_B),
        support_BK=torch.full((count, atoms), -1, dtype=torch.int64, device=target_BD.device),
        coefficients_BK=target_BD.new_zeros(count, atoms),
        atoms_BKD=target_BD.new_zeros(count, atoms, width),
        inverse_BKK=target_BD.new_zeros(count, atoms, atoms),
        left_B=squared_B.clone(),
        is_open_B=squared_B > 0,
    )


def extend(state: State, step: int, chosen_B: Tensor, atoms_ND: Tensor) -> None:
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
    state.is_open_B &= state.left_B > (EXACT * state.norm_B) ** 2


def residual(state: State, step: int, rows: Tensor | slice) -> Tensor:
    """What is left of some targets [R, D]."""
    used_RSD, weight_RS = state.atoms_BKD[rows, :step], state.coefficients_BK[rows, :step]
    return state.target_BD[rows] - torch.einsum("rs,rsd->rd", weight_RS, used_RSD)


def rank(
    residual_RD: Tensor,
    pairs: tuple[Tensor, Tensor],
    taken_RS: Tensor,
    atoms: Atoms,
    *,
    upper_Q: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The atom with the largest float64 score of each residual, and the score; -1 and 0 where none is left.

    Args:    pairs: which residual and which atom, [Q] each, sorted by residual.
             upper_Q: what the scores are at most, if that is known.
    """
    row_Q, atom_Q = pairs
    is_free_Q = ~(atom_Q[:, None] == taken_RS[row_Q]).any(1)
    row_Q, atom_Q = row_Q[is_free_Q], atom_Q[is_free_Q]
    if len(row_Q):
        row_Q, atom_Q = _leading(residual_RD, (row_Q, atom_Q), atoms, None if upper_Q is None else upper_Q[is_free_Q])
    parts = [residual_RD.new_zeros(0)]
    for first in range(0, len(row_Q), _PAIRS):
        span = slice(first, first + _PAIRS)
        parts.append((atoms.rows_ND[atom_Q[span]].double() * residual_RD[row_Q[span]]).sum(1).abs_())
    score_Q = torch.cat(parts)
    best_R = residual_RD.new_full((len(residual_RD),), -1.0).scatter_reduce_(0, row_Q, score_Q, "amax")
    is_best_Q = score_Q == best_R[row_Q]
    none = len(atoms.rows_ND)
    chosen_R = torch.full((len(residual_RD),), none, dtype=torch.int64, device=row_Q.device)
    chosen_R.scatter_reduce_(0, row_Q[is_best_Q], atom_Q[is_best_Q], "amin")
    return torch.where(chosen_R < none, chosen_R, -1), best_R.clamp(min=0.0)


def _leading(
    residual_RD: Tensor, pairs: tuple[Tensor, Tensor], atoms: Atoms, upper_Q: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Those pairs that float32 cannot rule out."""
    row_Q, atom_Q = pairs
    length_R = residual_RD.norm(dim=1)
    unit_RD = (residual_RD / torch.where(length_R > 0, length_R, 1.0)[:, None]).float()
    # The rounding of the residual, and the standard bound on the rounding of a sum of products.
    error_Q = 1.01 * (residual_RD.shape[1] + 3) * _UNIT * atoms.norm_N[atom_Q]
    floor_R = residual_RD.new_full((len(length_R),), -1.0)
    if upper_Q is not None:
        # What seems to lead is scored first: few of the others reach that.
        upper_Q = upper_Q / length_R[row_Q]
        most_R = floor_R.scatter_reduce(0, row_Q, upper_Q, "amax")
        seems_Q = (upper_Q == most_R[row_Q]).nonzero()[:, 0]
        score_Q = _scores(unit_RD, row_Q[seems_Q], atom_Q[seems_Q], atoms.rows_ND) - error_Q[seems_Q]
        floor_R.scatter_reduce_(0, row_Q[seems_Q], score_Q, "amax")
        is_left_Q = ~(upper_Q < floor_R[row_Q])
        row_Q, atom_Q, error_Q = row_Q[is_left_Q], atom_Q[is_left_Q], error_Q[is_left_Q]
    score_Q = _scores(unit_RD, row_Q, atom_Q, atoms.rows_ND)
    floor_R.scatter_reduce_(0, row_Q, score_Q - error_Q, "amax")
    is_left_Q = ~(score_Q + error_Q < floor_R[row_Q])  # not `>=`: a product out of float32's range decides nothing
    return row_Q[is_left_Q], atom_Q[is_left_Q]


def _scores(unit_RD: Tensor, row_Q: Tensor, atom_Q: Tensor, rows_ND: Tensor) -> Tensor:
    """Scores in float32, as float64; products of one residual with some atoms at a time."""
    count_R = torch.bincount(row_Q, minlength=len(unit_RD))
    group = _GROUP if len(row_Q) > 4 * len(unit_RD) else 1
    groups_R = (count_R + group - 1) // group
    before_R = group * (groups_R.cumsum(0) - groups_R) - (count_R.cumsum(0) - count_R)
    place_Q = torch.arange(len(row_Q), device=row_Q.device) + before_R[row_Q]
    padded_GE = torch.zeros(int(groups_R.sum()) * group, dtype=torch.int64, device=row_Q.device)
    padded_GE = padded_GE.index_put_((place_Q,), atom_Q).view(-1, group)
    row_G = torch.repeat_interleave(groups_R)
    parts = [unit_RD.new_zeros(0, group)]
    step = _GATHERED // group
    for first in range(0, len(row_G), step):
        span = slice(first, first + step)
        atom_GED = rows_ND.index_select(0, padded_GE[span].flatten()).view(-1, group, unit_RD.shape[1])
        unit_GD1 = unit_RD.index_select(0, row_G[span])[:, :, None]
        parts.append(torch.bmm(atom_GED, unit_GD1)[:, :, 0].abs_())
    return torch.cat(parts).flatten()[place_Q].double()


def settle(residual_RD: Tensor, taken_RS: Tensor, atoms: Atoms) -> tuple[Tensor, Tensor]:
    """Choose among all atoms; atom and score as `rank` gives them. Float32 rules out what it can."""
    count = len(atoms.rows_ND)
    chosen_R = torch.full((len(residual_RD),), -1, dtype=torch.int64, device=residual_RD.device)
    score_R = residual_RD.new_zeros(len(residual_RD))
    rows = max(1, _SCORES // count)
    for first in range(0, len(residual_RD), rows):
        span = slice(first, first + rows)
        part_RD = residual_RD[span]
        length_R1 = part_RD.norm(dim=1, keepdim=True)
        unit_RD = (part_RD / torch.where(length_R1 > 0, length_R1, 1.0)).float()
        score_RN = (unit_RD @ atoms.rows_ND.T).abs_().scatter_(1, taken_RS[span].clamp(min=0), -1.0)
        error_N = 1.01 * (part_RD.shape[1] + 3) * _UNIT * atoms.norm_N.float() * 1.001
        floor_R1 = (score_RN - error_N).amax(1, keepdim=True)
        row_Q, atom_Q = (~(score_RN + error_N < floor_R1)).nonzero(as_tuple=True)
        chosen_R[span], score_R[span] = rank(part_RD, (row_Q, atom_Q), taken_RS[span], atoms)
    return chosen_R, score_R
