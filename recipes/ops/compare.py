"""How far two results are apart, as one finite number that a gate can hold.

Place in the path: recipe -> **ops**. Pure.
Invariants: what is not finite, on either side, is as far away as a float can say; nothing hides behind a maximum.

Example:
    >>> largest_difference([torch.ones(2)], [torch.ones(2)])
    0.0
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from recipes.ops.roots import square_root


def largest_difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Largest |a - b| over all pairs; the largest float if anything is not finite."""
    gaps = [(a.float() - b.float()).abs().max() for a, b in zip(before, after, strict=True)]
    return _finite(torch.stack(gaps).max())


def relative_difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """|a - b| / |a| over all pairs together, Frobenius norms; the largest float if that is not finite.

    Both zero are 0 apart.
    """
    wide = torch.float64
    gaps = [(a.float() - b.float()).square().sum(dtype=wide) for a, b in zip(before, after, strict=True)]
    sizes = [a.float().square().sum(dtype=wide) for a in before]
    gap, size = torch.stack(gaps).sum(), torch.stack(sizes).sum()
    return 0.0 if bool(gap == 0) else _finite(square_root(gap / size))


def _finite(value: Tensor) -> float:
    return float(value) if bool(torch.isfinite(value)) else sys.float_info.max
