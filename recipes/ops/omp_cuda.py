"""Orthogonal matching pursuit on a GPU: one float16 product of residuals and atoms a step, and kernels around it.

Place in the path: `omp` -> **here** -> `omp_kernels`. The product is the screen: its scores and the bound on their
error leave a few atoms, which float64 ranks. Targets whose atoms do not fit a list are settled as on a CPU.
float16, not bfloat16: rows are brought to one length, so range is not short, and each rounding is an eighth.

A card that has no room for the dictionary gets what fits: the atoms' rows stay in page-locked memory of the host, where
the kernels read the few they need, and if need be their rounded copy is sent slice after slice. Results are the same.

Legend: B targets, R some of them, N atoms, P atoms filled up to whole blocks, J blocks, D width, K atoms a target.

Invariants: nothing here depends on which targets are solved together, or on how many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from recipes.ops.omp_choice import Tally
from recipes.ops.omp_product import WIDTH as BLOCK
from recipes.ops.omp_product import rounded_atoms
from recipes.ops.omp_state import EXACT, Atoms, settle

_GROUP: Final = 64  # blocks that one program looks through
_LIST: Final = 64  # blocks, and ...
_CAP: Final = 128  # ... atoms that are listed for a target
_UNIT: Final = 64.0  # length that rows are brought to: elements lie well inside float16's normal numbers
_ROWS: Final = 4096  # targets at a time, at most ...
_ROWS_LEAST: Final = 256  # ... and what the card must have room for besides the atoms


def free_bytes(device: torch.device) -> int:
    """Memory of the card that an allocation may get."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class CardScreen:
    """A dictionary prepared for a GPU."""

    def __init__(self, atoms: Atoms, scale: float, device: torch.device) -> None:
        """Round the atoms, and put on the card what it has room for.

        Args:    atoms: on the card or on the host.
                 scale: a power of two that brings the longest atom to a length between a half and one.
        """
        count, width = atoms.rows_ND.shape
        self.device, self.count, self.width = device, count, width
        self.padded = count + -count % BLOCK
        self.largest = float(atoms.norm_N.max())
        least = _ROWS_LEAST * target_bytes(count, width, 64)
        is_here = atoms.rows_ND.device == device
        room = free_bytes(device) - least
        if is_here and room < 2 * self.padded * width:
            atoms = Atoms(atoms.rows_ND.cpu(), atoms.norm_N.cpu())  # the caller's copy stays where it is
            is_here = False
        elif not is_here and room >= 6 * self.padded * width:
            atoms = Atoms(atoms.rows_ND.to(device), atoms.norm_N.to(device))
            is_here = True
        self.atoms = atoms if is_here else Atoms(atoms.rows_ND.pin_memory(), atoms.norm_N)
        self.slice = self.padded
        if not is_here and room < 2 * self.padded * width:
            self.slice = max(BLOCK, room // 2 // (2 * width) // BLOCK * BLOCK)
        on_card = self.slice == self.padded
        shape = (self.padded, width)
        screen_PD = torch.zeros(shape, dtype=torch.float16, device=device if on_card else "cpu", pin_memory=not on_card)
        norm_N, self.spread = rounded_atoms(self.atoms.rows_ND, scale * _UNIT, screen_PD)
        self._screen_PD = screen_PD
        norm_P = torch.nn.functional.pad(norm_N, (0, self.padded - count))
        self.norm_J = norm_P.view(-1, BLOCK).amax(1).to(device)
        slices = -(-self.padded // self.slice)
        self.route = "cuda" if is_here else f"cuda, atoms on the host, {slices} slice" + ("s" if slices > 1 else "")

    def rows(self, targets: int, atoms: int) -> int:
        """Targets at a time: as many as there is room for, in equal parts."""
        fitting = free_bytes(self.device) * 9 // 10 // target_bytes(self.count, self.width, atoms)
        at_once = max(1, min(_ROWS, fitting))
        return -(-targets // -(-targets // at_once)) if targets else 1

    def score(self, rounded_BD: Tensor, score_BP: Tensor) -> None:
        """Scores of all atoms."""
        if self.slice == self.padded:
            torch.mm(rounded_BD, self._screen_PD.T, out=score_BP)
            return
        for first in range(0, self.padded, self.slice):
            part_MD = self._screen_PD[first : first + self.slice].to(self.device, non_blocking=True)
            score_BP[:, first : first + self.slice] = rounded_BD @ part_MD.T

    def solve(self, targets_BD: Tensor, atoms: int, tally: Tally) -> tuple[Tensor, Tensor, Tensor]:
        """Support, coefficients and relative residual of some targets, on the card."""
        with torch.cuda.device(self.device):
            block = _Block(self, targets_BD.to(self.device), atoms)
            for step in range(atoms):
                if not block.step(step, tally):
                    break
            return block.support_BK, block.coefficients_BK, block.relative_residual()


def target_bytes(count: int, width: int, atoms: int) -> int:
    """Memory of the card that one target takes."""
    return 2 * count + 4 * atoms * width + 8 * atoms * atoms + 32 * width + 8 * count // BLOCK + 8192


@dataclass
class _Listed:
    """What a step finds, overwritten by the next."""

    score_BP: Tensor
    upper_BJ: Tensor
    lower_BG: Tensor
    floor_B: Tensor
    blocks_BL: Tensor
    filled_B: Tensor
    atoms_BC: Tensor
    number_B: Tensor


class _Block:
    """Some targets on their way through the steps."""

    def __init__(self, screen: CardScreen, targets_BD: Tensor, atoms: int) -> None:
        self._screen, self._atoms = screen, atoms
        self._residual_BD = targets_BD.float().double().contiguous()
        count, width = targets_BD.shape
        wide = self._residual_BD
        self._left_B = wide.square().sum(1)
        self._norm_B = wide.norm(dim=1)
        self._whole_B = self._norm_B.clone()
        self._limit_B = (EXACT * self._whole_B) ** 2
        self._open_B = (self._left_B > 0).to(torch.int8)
        self.support_BK = torch.full((count, atoms), -1, dtype=torch.int64, device=wide.device)
        self.coefficients_BK = wide.new_zeros(count, atoms)
        self._basis_BKK = wide.new_zeros(count, atoms, atoms)
        self._inner_BK = wide.new_zeros(count, atoms)
        self._used_BKD = wide.new_empty(count, atoms, width, dtype=torch.float32)
        self._rounded_BD = wide.new_empty(count, width, dtype=torch.float16)
        self._slack_B = wide.new_zeros(count, dtype=torch.float32)
        self._gain_B, self._best_B = wide.new_zeros(count), wide.new_zeros(count)
        self._chosen_B = torch.zeros(count, dtype=torch.int64, device=wide.device)
        self._tally_K3 = torch.zeros(atoms, 3, dtype=torch.int32, device=wide.device)
        blocks = len(screen.norm_J)
        self._listed = _Listed(
            score_BP=wide.new_empty(count, screen.padded, dtype=torch.float16),
            upper_BJ=wide.new_empty(count, blocks, dtype=torch.float32),
            lower_BG=wide.new_empty(count, -(-blocks // _GROUP), dtype=torch.float32),
            floor_B=wide.new_empty(count, dtype=torch.float32),
            blocks_BL=wide.new_empty(count, _LIST, dtype=torch.int32),
            filled_B=wide.new_empty(count, dtype=torch.int32),
            atoms_BC=wide.new_empty(count, _CAP, dtype=torch.int32),
            number_B=wide.new_empty(count, dtype=torch.int32),
        )
        if count:
            self._subtract(0)

    def step(self, step: int, tally: Tally) -> bool:
        """Take one more atom into each support; false when no target is open."""
        if len(self._open_B) == 0:
            return False
        self._list(step)
        open_, ranked, unsettled = self._tally_K3[step].tolist()  # the only wait for the card in a step
        tally.add(Tally(open_, ranked - unsettled, unsettled))
        if open_ == 0:
            return False
        if unsettled:
            self._settle(step)
        self._take(step)
        self._subtract(step + 1)
        return True

    def relative_residual(self) -> Tensor:
        """Length of what is left over the target's."""
        relative_B: Tensor = self._norm_B / torch.where(self._whole_B > 0, self._whole_B, 1.0)
        return relative_B

    def _list(self, step: int) -> None:
        from recipes.ops import omp_kernels as kernels  # its compiler comes with torch's builds for GPUs only

        screen, listed, rows = self._screen, self._listed, len(self._open_B)
        screen.score(self._rounded_BD, listed.score_BP)
        blocks, parts = listed.upper_BJ.shape[1], listed.lower_BG.shape[1]
        kernels.block_bounds[(rows, parts)](
            listed.score_BP.view(torch.int16), screen.norm_J, self._slack_B, listed.upper_BJ, listed.lower_BG, blocks,
            BLOCK=BLOCK, GROUP=_GROUP,
        )  # fmt: skip
        kernels.list_blocks[(rows,)](
            listed.upper_BJ, listed.lower_BG, listed.floor_B, listed.blocks_BL, listed.filled_B, blocks, parts,
            BLOCKS=_power(blocks), PARTS=_power(parts), LIST=_LIST,
        )  # fmt: skip
        kernels.list_atoms[(rows,)](
            listed.score_BP, screen.norm_J, self._slack_B, listed.floor_B, listed.blocks_BL, listed.filled_B,
            listed.atoms_BC, listed.number_B, screen.count, blocks, BLOCK=BLOCK, LIST=_LIST, CAP=_CAP,
        )  # fmt: skip
        kernels.rank[(rows,)](
            screen.atoms.rows_ND, self._residual_BD, listed.atoms_BC, listed.number_B, self.support_BK, self._open_B,
            self._chosen_B, self._best_B, self._tally_K3, step, screen.width, self._atoms,
            CAP=_CAP, KEPT=_power(self._atoms), WIDTH=1024,
        )  # fmt: skip

    def _settle(self, step: int) -> None:
        """Those with too many atoms to list, by a look at all; where the atoms lie."""
        rows_R = (self._chosen_B == -2).nonzero()[:, 0]
        atoms = self._screen.atoms
        place = atoms.rows_ND.device
        residual_RD = self._residual_BD[rows_R].to(place)
        chosen_R, _ = settle(residual_RD, self.support_BK[rows_R, :step].to(place), atoms)
        score_R = (atoms.rows_ND[chosen_R.clamp(min=0)].double() * residual_RD).sum(1)
        self._chosen_B[rows_R] = chosen_R.to(self._chosen_B.device)
        self._best_B[rows_R] = score_R.to(self._best_B.device)

    def _take(self, step: int) -> None:
        from recipes.ops import omp_kernels as kernels

        screen, rows, kept = self._screen, len(self._open_B), self._atoms
        kernels.take[(rows,)](
            screen.atoms.rows_ND, self._chosen_B, self._best_B, self._norm_B, EXACT * screen.largest, self._used_BKD,
            step, screen.width, kept, WIDTH=1024,
        )  # fmt: skip
        kernels.inner_products[(rows, step // 8 + 1)](
            self._used_BKD, self._chosen_B, self._inner_BK, step, screen.width, kept, ROWS=8, WIDTH=512
        )
        kernels.advance[(rows,)](
            self._chosen_B, self._best_B, self._inner_BK, self._basis_BKK, self.support_BK, self.coefficients_BK,
            self._left_B, self._limit_B, self._open_B, self._gain_B, step, kept, KEPT=_power(kept), ROWS=16,
        )  # fmt: skip

    def _subtract(self, steps: int) -> None:
        from recipes.ops import omp_kernels as kernels

        kernels.residuals[(len(self._open_B),)](
            self._used_BKD, self._basis_BKK, self._gain_B, self._left_B, self._open_B, self._residual_BD,
            self._rounded_BD, self._norm_B, self._slack_B, steps, self._screen.width, self._atoms,
            UNIT=_UNIT, spread=self._screen.spread, ROWS=8, WIDTH=512,
        )  # fmt: skip


def _power(size: int) -> int:
    """The power of two that is not smaller, and at least 16."""
    return max(16, 1 << (size - 1).bit_length())
