"""How far two results are apart, as one finite number that a gate can hold.

Place in the path: recipe -> **ops**. Pure.
Invariants: what is not finite, on either side, is as far away as a float can say; nothing hides behind a maximum.

Example:
    >>> apart = Distance()
    >>> apart.add(torch.ones(2), torch.ones(2))
    >>> apart.largest
    0.0
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from recipes.ops.roots import square_root


class Distance:
    """Taken in pair by pair, so that logits need not be in memory all at once."""

    def __init__(self) -> None:
        self._largest: list[Tensor] = []
        self._gap: list[Tensor] = []
        self._size: list[Tensor] = []

    def add(self, before: Tensor, after: Tensor) -> None:
        """Take in two tensors of one shape; sums are float64."""
        gap = before.float() - after.float()
        self._largest.append(gap.abs().max())
        self._gap.append(gap.square().sum(dtype=torch.float64))
        self._size.append(before.float().square().sum(dtype=torch.float64))

    @property
    def largest(self) -> float:
        """Largest |a - b| over all pairs; the largest float if anything is not finite."""
        return _finite(torch.stack(self._largest).max())

    @property
    def relative(self) -> float:
        """|a - b| / |a| over all pairs together, Frobenius norms; the largest float if that is not finite.

        Both zero are 0 apart.
        """
        gap, size = torch.stack(self._gap).sum(), torch.stack(self._size).sum()
        return 0.0 if bool(gap == 0) else _finite(square_root(gap / size))


def _finite(value: Tensor) -> float:
    return float(value) if bool(torch.isfinite(value)) else sys.float_info.max
