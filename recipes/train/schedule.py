"""The learning rate as a pure function of the step.

Place in the path: params -> **schedule** -> loop. Nothing is kept between steps, so a resumed run has the same rate.

Example:
    >>> factor(0, total=10, warmup=2, shape="linear", final=0.0)
    0.5
"""

from __future__ import annotations

import math
from typing import Literal

Shape = Literal["cosine", "linear", "constant"]


def factor(step: int, *, total: int, warmup: int, shape: Shape, final: float) -> float:
    """Share of the peak rate at 0-based `step` of `total`.

    A straight rise that reaches 1 at step `warmup - 1`, then a fall that reaches `final` at step `total - 1`; a run
    that is all warmup never falls.

    Args:    final: share of the peak at the last step, 0..1; `constant` ignores it.
    """
    if step < warmup:
        return (step + 1) / warmup
    if shape == "constant" or total - warmup <= 1:
        return 1.0
    done = min((step - warmup) / (total - 1 - warmup), 1.0)
    left = 1.0 - done if shape == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)
    return final + (1.0 - final) * left
