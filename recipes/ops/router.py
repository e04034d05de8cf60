"""The router's first weights, and how evenly a router spreads its tokens.

Place in the path: recipe -> **ops**. Pure.
Invariants: rows are drawn, never zero: with equal scores every token would go to the experts of lowest index. Rows
that must tie are equal bit for bit.

Shapes: E experts, D model.

Example:
    >>> router_rows(32, 64, std=0.08, share_by=1, seed=1, name="router").shape
    torch.Size([32, 64])
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.ops.noise import normal
from vpstore.errors import ShapeMismatch


def router_rows(experts: int, width: int, *, std: float, share_by: int, seed: int, name: str) -> Tensor:
    """Normal router rows, each repeated for `share_by` consecutive experts.

    Args:    share_by: 1 for independent rows; top_k for virtual groups that tokens pick as a whole.
    Returns: float32 [E, D].
    Raises:  ShapeMismatch: experts do not divide into groups of share_by.
    Source:  He et al. 2024, arXiv:2410.07524 (virtual group initialisation).
    """
    if experts % share_by:
        raise ShapeMismatch(
            "experts do not divide into virtual groups",
            where=name,
            expected=f"a multiple of {share_by}",
            found=str(experts),
            next_step="change num_experts or top_k",
        )
    rows_GD = normal((experts // share_by, width), seed=seed, name=name, std=std)
    return rows_GD.repeat_interleave(share_by, dim=0)


def without_direction(rows_ED: Tensor, direction_D: Tensor) -> Tensor:
    """Router rows with their component along one direction removed.

    Normalised activations share a mean; along it every token agrees, so a row's component there is a constant head
    start of one expert over the others, which is what uneven loads at the start are made of.

    Args:    direction_D: any length; zero removes nothing.
    Returns: float32 [E, D], each row orthogonal to the direction up to rounding.
    """
    rows, direction = rows_ED.double(), direction_D.double()
    energy = direction.dot(direction)
    if energy == 0:
        return rows_ED.float()
    return (rows - torch.outer(rows @ direction, direction) / energy).float()


@dataclass(frozen=True)
class Spread:
    """How evenly the picks of one layer fall on its experts."""

    entropy: float  # of the load histogram, nats; uniform = ln E
    relative_entropy: float  # entropy / ln E
    max_load: float  # share of the picks that the busiest expert gets; uniform = 1 / E
    dead: int  # experts without a pick


def spread(counts_E: Tensor) -> Spread:
    """Measure a load histogram.

    Args:    counts_E: picks of each expert, not all zero.
    Returns: figures of the empirical load, computed in float64.
    """
    experts = counts_E.shape[0]
    share_E = counts_E.double() / counts_E.sum()
    entropy = -math.fsum(share * math.log(share) for share in share_E.tolist() if share > 0)
    return Spread(
        entropy=entropy,
        relative_entropy=entropy / math.log(experts) if experts > 1 else 1.0,
        max_load=float(share_E.max()),
        dead=int((counts_E == 0).sum()),
    )


def split_groups(counts: Iterable[Tensor], top_k: int) -> int:
    """Virtual groups whose members were not chosen equally often: 0 if every token took whole groups.

    Args:    counts: picks of each expert [E], one tensor a layer.
    """
    grouped = [count_E.reshape(-1, top_k) for count_E in counts]
    return sum(int((group.amax(dim=1) != group.amin(dim=1)).sum()) for group in grouped)
