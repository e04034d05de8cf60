"""Positions: learnable rotation (GRAPE-M) on local layers, linear distance bias (GRAPE-A = ALiBi) on global ones.

Place in the path: recipe -> **model**. In real mode one `GrapeM` serves all local layers; in compat mode the same
tables are built from RoPE's fixed frequencies and nothing is stored.

Invariants: everything here is at least float32 (T10: frequencies in bfloat16 are off by up to 3%, 1.5 rad at position
2047); the rotation pairs dimensions (i, i + D/2), as Hugging Face's Qwen3 does.

Shapes: B batch, T tokens, Q heads, D head dimension, F = D/2 planes.

Example:
    >>> tables = rotary_tables(torch.arange(5)[None], rope_frequencies(128, base=1e6))
    >>> rotate(torch.randn(1, 5, 8, 128), tables).shape
    torch.Size([1, 5, 8, 128])
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Generator, Tensor, nn

from recipes.model.precision import KeepsFloat32, wide, wide_dtype

# log_freq is the logarithm of the frequency times this, which divides its learning rate under Adam by as much.
LOG_FREQ_SCALE = 16.0


class RotaryTables(NamedTuple):
    """Cosine and sine of every token's angle in every plane: [B or 1, T, 1, F], at least float32."""

    cos_BT1F: Tensor
    sin_BT1F: Tensor


def rope_frequencies(head_dim: int, *, base: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """RoPE's frequencies base^(-2i/D), i = 0 .. D/2 - 1, on the CPU.

    Returns: [D/2] in `dtype`, rounded once from float64; radians a position.
    Source:  Su et al. 2021, arXiv:2104.09864.
    """
    return torch.exp(_log_frequencies(head_dim, base)).to(dtype)


def initial_log_freq(head_dim: int, *, base: float) -> Tensor:
    """The `GrapeM.log_freq` that gives RoPE's frequencies for `base`: -16 * (2i/D) * ln(base), float32 [D/2]."""
    return (LOG_FREQ_SCALE * _log_frequencies(head_dim, base)).to(torch.float32)


def _log_frequencies(head_dim: int, base: float) -> Tensor:
    plane = torch.arange(head_dim // 2, dtype=torch.float64, device="cpu")
    return -2.0 * plane / head_dim * math.log(base)


class GrapeM(KeepsFloat32):
    """Learnable frequencies w_i = exp(log_freq_i / 16), one module for the whole model.

    Source:  GRAPE-M with canonical planes (the commuting special case).
    """

    pinned: ClassVar[tuple[str, ...]] = ("log_freq",)

    def __init__(self, head_dim: int, *, base: float) -> None:
        super().__init__()
        self.head_dim, self.base = head_dim, base
        self.log_freq = nn.Parameter(torch.empty(head_dim // 2, dtype=torch.float32))
        self.draw()

    def draw(self, generator: Generator | None = None) -> None:
        """Start at RoPE's spectrum; nothing random."""
        if not self.log_freq.is_meta:
            with torch.no_grad():
                self.log_freq.copy_(initial_log_freq(self.head_dim, base=self.base))

    def frequencies(self) -> Tensor:
        """w_F, radians a position; learnable, so never kept across steps."""
        return torch.exp(self.log_freq / LOG_FREQ_SCALE)


def rotary_tables(positions_BT: Tensor, frequency_F: Tensor) -> RotaryTables:
    """Tables for angle = position * frequency, in the dtype of the frequencies."""
    angle_BT1F = positions_BT.to(frequency_F.dtype)[..., None, None] * frequency_F
    return RotaryTables(angle_BT1F.cos(), angle_BT1F.sin())


def rotate(x_BTQD: Tensor, tables: RotaryTables) -> Tensor:
    """Turn every plane (i, i + D/2) of every head by its token's angle.

    Returns: same shape and dtype; computed in at least float32.
    """
    first, second = wide(x_BTQD).chunk(2, dim=-1)
    cos, sin = (table.to(wide_dtype(x_BTQD.dtype)) for table in tables)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTQD.dtype)


def alibi_slopes(heads: int, *, device: torch.device | str | None = None) -> Tensor:
    """Slope of each query head: s_h = 2^-(h+1), h from 0; float32 [heads].

    Source:  Press et al. 2021, arXiv:2108.12409; for 8 heads.
    """
    return torch.exp2(-torch.arange(1, heads + 1, dtype=torch.float32, device=device))
