"""Square roots and logarithms of base 2 whose bits no make of processor decides.

Place in the path: below every recipe and the optimizer; part of their closures.

Invariants: nothing here goes through a vector library. torch gives `sqrt` and `log2` of many values to MKL, which
rounds them otherwise on another make of processor, also under MKL_CBWR=COMPATIBLE: on one, a fifth of all float32 roots
were one unit of the last place off. `rsqrt` and `reciprocal` are instructions whose rounding IEEE 754 rules; `log` is
among those that COMPATIBLE covers. A test forbids the two functions everywhere else in recipes/.

Example:
    >>> square_root(torch.tensor([0.0, 4.0]))
    tensor([0., 2.])
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LOG2_E = math.log2(math.e)


def square_root(x: Tensor) -> Tensor:
    """Elementwise square root, same shape and dtype; at most one unit of the last place off, 0 and infinity exact."""
    return torch.rsqrt(x).reciprocal_()


def binary_log(x: Tensor) -> Tensor:
    """Elementwise logarithm of base 2, same shape and dtype; within some units of the last place."""
    return torch.log(x) * _LOG2_E
