"""Rows for numbers of several digits, composed from the rows of single digits.

Place in the path: the vocabulary transplant. The donor reads "202" as three tokens; the new vocabulary has one. What
should its one row be? Not an unordered mixture: "202", "220" and "022" would come out (nearly) alike.

*Input row.* Where the donor has read "202", the stream starts from the row of the **last** digit, and what the earlier
digits were arrives through attention. So the last digit leads, and the earlier ones follow, each weaker than the one
after it.
*Output row.* Where the donor is about to say "202", it scores the row of the **first** digit; the others are not due
yet. So the first digit leads, and the later ones only tell the hundred numbers that start alike apart.

In both, the digit `p` places from the leading one is bound to its place by a fixed pattern of signs S_p:
    row = E[d_0] + sum_p decay^p * S_p * (E[d_p] - mean digit)
A plain weighted sum would do for order alone, but "2", "22" and "222" would point the same way, and a model that
normalises its input could not tell them apart. The signs keep the following digits out of the leading digit's
direction (random signs make them almost orthogonal to every row), so that each place can be read off linearly.

Legend: H hidden, M numbers.

Invariants: two numbers have equal rows only if they are the same string, as long as the digits' rows differ and the
sign patterns do not conspire (held by a gate of the recipe); the order of `numbers` does not change a row.

Example:
    >>> compose_numbers(torch.randn(10, 64), ["12", "21"], leading="last", decay=0.5, seed=0).shape
    torch.Size([2, 64])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vpstore.errors import ShapeMismatch


def compose_numbers(
    digits_10H: Tensor, numbers: Sequence[str], *, leading: Literal["first", "last"], decay: float, seed: int
) -> Tensor:
    """One row a number; see the module for the formula and why.

    Args:    digits_10H: rows of "0".."9". numbers: strings of ASCII digits. leading: which digit counts in full.
             decay: weight of each further place against the one before, 0..1.
    Returns: float64 [M, H].
    Raises:  ShapeMismatch: not ten rows, or something that is no number.
    """
    if digits_10H.ndim != 2 or digits_10H.shape[0] != 10:
        raise ShapeMismatch("digits need ten rows", expected="[10, H]", found=str(list(digits_10H.shape)))
    if not all(text.isascii() and text.isdigit() for text in numbers):
        raise ShapeMismatch("a number has other characters than digits", expected="0-9", found=repr(list(numbers))[:80])
    rows_10H = digits_10H.double()
    centred_10H = rows_10H - rows_10H.mean(0)
    places = max((len(text) for text in numbers), default=1)
    signs_PH = place_signs(places, rows_10H.shape[1], seed).to(rows_10H)
    composed = rows_10H.new_zeros(len(numbers), rows_10H.shape[1])
    for row_H, text in zip(composed, numbers, strict=True):
        ordered = [int(digit) for digit in (text if leading == "first" else reversed(text))]
        row_H += rows_10H[ordered[0]]
        for place, digit in enumerate(ordered[1:], start=1):
            row_H += decay**place * signs_PH[place] * centred_10H[digit]
    return composed


def place_signs(places: int, width: int, seed: int) -> Tensor:
    """Patterns of +1 and -1, one a place; the first is all +1. Longer lists begin with the shorter ones.

    Returns: float32 [places, width].
    """
    generator = torch.Generator().manual_seed(seed)
    signs = [torch.ones(width)]
    for _ in range(places - 1):
        signs.append(torch.randint(0, 2, (width,), generator=generator).float() * 2 - 1)
    return torch.stack(signs)


def closest_pair(rows_MH: Tensor) -> float:
    """The largest cosine between two different rows around their mean: 1.0 means that two cannot be told apart.

    Around the mean, because what all numbers share says nothing about which of them is meant.
    """
    centred_MH = rows_MH.double() - rows_MH.double().mean(0)
    unit_MH = torch.nn.functional.normalize(centred_MH, dim=1)
    return float((unit_MH @ unit_MH.T).fill_diagonal_(-1.0).max())
