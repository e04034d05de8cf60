"""Keys and values of the tokens so far, so that the next one costs one: of a global layer all, of a local a window.

Place in the path: recipe -> **model**; `generation` makes one for a batch of prompts and puts it into the stream. The
first pass, over whole prompts, fills it; each later pass adds one token a row and reads what is there.

Invariants: a local layer keeps as many tokens as its window, the oldest overwritten; what lies at a place that no token
has reached is never visible; keys are kept rotated, values mixed; rows have lengths of their own.

Shapes: B batch, T tokens, K KV heads, D head dimension, S places.

Example:
    cache = Cache(lengths_B, places=300)
    state = Stream.of_rows(T, device=device, cache=cache)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Recalled(NamedTuple):
    """What one layer has kept."""

    k_BKSD: Tensor
    v_BKSD: Tensor
    position_BS: Tensor  # of the token at each place, negative where there is none


class Cache:
    """Of all layers of one model."""

    def __init__(self, lengths_B: Tensor, *, places: int) -> None:
        """An empty cache.

        Args:    lengths_B: int64, tokens of each prompt. places: tokens that a row will have in the end, at most.
        """
        self.lengths_B, self.places = lengths_B, places  # tokens that are in the cache; `advance` counts on
        self.is_filled = False
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # by layer number

    def fill(self, number: int, k_BTKD: Tensor, v_BTKD: Tensor, *, window: int | None) -> None:
        """Keep the prompts' tokens of layer `number`; what lies behind a row's length is taken along, unseen."""
        size = self._size(window)
        tokens = k_BTKD.shape[1]
        if window is None:
            source = torch.arange(min(tokens, size), device=k_BTKD.device)[None]
        else:
            source = self._positions(size).clamp(0, tokens - 1)
        kept = []
        for x in (k_BTKD, v_BTKD):
            index = source[:, :, None, None].expand(x.shape[0], -1, *x.shape[2:])
            part = x.gather(1, index).transpose(1, 2)
            whole = x.new_zeros(x.shape[0], x.shape[2], size, x.shape[3])
            whole[:, :, : part.shape[2]] = part
            kept.append(whole)
        self._kept[number] = (kept[0], kept[1])

    def extend(self, number: int, k_B1KD: Tensor, v_B1KD: Tensor, *, window: int | None) -> Recalled:
        """Put one token a row behind the others, and give all of them."""
        size = self._size(window)
        place_B111 = (self.lengths_B % size)[:, None, None, None]
        for kept, new in zip(self._kept[number], (k_B1KD, v_B1KD), strict=True):
            new_BK1D = new.transpose(1, 2)
            kept.scatter_(2, place_B111.expand_as(new_BK1D), new_BK1D)
        return Recalled(*self._kept[number], self._positions(size, ahead=1))

    def advance(self) -> None:
        """One token more in every row, in place: a captured pass reads the lengths where they lie."""
        self.lengths_B += 1

    def keep(self, rows_R: Tensor) -> None:
        """Go on with these rows alone."""
        self.lengths_B = self.lengths_B[rows_R]
        self._kept = {number: (k[rows_R], v[rows_R]) for number, (k, v) in self._kept.items()}

    def _size(self, window: int | None) -> int:
        return self.places if window is None else min(window, self.places)

    def _positions(self, size: int, *, ahead: int = 0) -> Tensor:
        """Position of the youngest token at each place, of rows with `ahead` tokens more; negative if there is none."""
        last_B1 = self.lengths_B[:, None] + ahead - 1
        place_S = torch.arange(size, device=self.lengths_B.device)
        return last_B1 - (last_B1 - place_S) % size
