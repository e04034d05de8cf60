"""Softmax offsets that stand in for attention mass which a layer no longer sees.

Place in the path: recipe -> **ops**. Pure.
Invariants: the offset is a virtual key of value 0, so it keeps the share exp(lse) / (exp(lse) + exp(offset)) for the
real keys; solving is bisection in float64, the same on every machine.

Shapes: T queries, Q heads.

Example:
    >>> match_kept_mass(torch.zeros(5, 1), torch.tensor([0.5]), at_least_Q=torch.tensor([-30.0]))
    tensor([0.], dtype=torch.float64)
"""

from __future__ import annotations

import torch
from torch import Tensor

_HIGHEST = 60.0  # a logit that no normalised score reaches
_HALVINGS = 80


def kept_mass(seen_TQ: Tensor, all_TQ: Tensor, offset_Q: Tensor) -> Tensor:
    """Mean share of the softmax that falls on the keys of `seen`, out of `all` keys and the offset.

    Args:    seen_TQ, all_TQ: log-sum-exp of the scores of either set of keys.
    Returns: float64 [Q] in (0, 1].
    """
    total_TQ = torch.logaddexp(all_TQ.double(), offset_Q.double())
    return torch.exp(seen_TQ.double() - total_TQ).mean(dim=0)


def match_kept_mass(lse_TQ: Tensor, target_Q: Tensor, *, at_least_Q: Tensor) -> Tensor:
    """The offset with which each head keeps `target` of its mass on the mean over queries.

    Args:    target_Q: in (0, 1); a target that even `at_least` does not reach gives `at_least`.
             at_least_Q: the offset is never below this, so that no head is opened further than it was.
    Returns: float64 [Q].
    """
    lse, target = lse_TQ.double(), target_Q.double()
    low = at_least_Q.double().clone()
    high = torch.full_like(low, _HIGHEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        too_much = torch.sigmoid(lse - middle).mean(dim=0) > target  # keeps more than asked: raise the offset
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    at_floor = torch.sigmoid(lse - at_least_Q.double()).mean(dim=0) <= target
    return torch.where(at_floor, at_least_Q.double(), (low + high) / 2)
