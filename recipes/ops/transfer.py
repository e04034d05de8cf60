"""Carrying a combination from the reference's space into the donor's: how far can it be trusted?

Place in the path: between OMP's coefficients and the rows of the transplant.

Plain transfer, sum_k c_k Q_k, is what mergekit-tokensurgeon does. Its weakness: a donor's rows share a large common
part (in a head, the direction that keeps an unused token's logit low), and the coefficients of a row do not sum to one,
so each new row gets a random share of it; a hundred thousand such rows then take the probability from the real ones.
Calibrated transfer puts the common part in whole and shrinks the rest by what is known to be right:

    row = mean + gain * sum_k c_k (Q_k - mean),   gain = <prediction, truth> / <prediction, prediction>

The gain is the least-squares slope on anchors that were kept out of the dictionary: their true rows are known.

Legend: B rows, K atoms a row, N atoms of the dictionary, H width of the donor.
Invariant: an unused atom (support -1) has the coefficient 0 and adds nothing.

Example:
    >>> combine(torch.tensor([[0, -1]]), torch.tensor([[2.0, 0.0]]), torch.eye(2), torch.zeros(2), gain=1.0)
    tensor([[2., 0.]])
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Gain(NamedTuple):
    """The slope, and how much of the held-out anchors' deviation from the mean it explains."""

    slope: float
    r_squared: float | None  # None: not measured


def combine(support_BK: Tensor, coefficients_BK: Tensor, centred_NH: Tensor, mean_H: Tensor, *, gain: float) -> Tensor:
    """Rows in the donor's space from coefficients that were found in the reference's.

    Args:    support_BK: which atoms, -1 for none; centred_NH: the donor's rows of the atoms less the mean, float32.
             mean_H: zeros and gain 1 for plain transfer.
    Returns: [B, H], float32.
    """
    index_BK, weight_BK = support_BK.clamp(min=0).long(), coefficients_BK.float()
    return mean_H + gain * F.embedding_bag(index_BK, centred_NH, per_sample_weights=weight_BK, mode="sum")


def measure_gain(predicted_BH: Tensor, true_BH: Tensor, mean_H: Tensor) -> Gain:
    """The slope of the truth over the prediction, both as deviations from the mean; statistics in float64.

    Returns: slope 0 where the prediction is the mean itself. A negative slope is reported as 0: the mean is better.
    """
    predicted, true = (predicted_BH - mean_H).double(), (true_BH - mean_H).double()
    energy = float(predicted.square().sum())
    slope = max(0.0, float((predicted * true).sum()) / energy) if energy > 0 else 0.0
    spread = float(true.square().sum())
    left = float((true - slope * predicted).square().sum())
    return Gain(slope, 1.0 - left / spread if spread > 0 else 0.0)


def held_out_positions(count: int, held_out: int) -> list[int]:
    """`held_out` positions spread evenly over 0..count-1: all frequencies are among them."""
    held_out = min(held_out, count // 2)
    return [(2 * number + 1) * count // (2 * held_out) for number in range(held_out)] if held_out else []
