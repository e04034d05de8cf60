"""Gradients of both factors of composed heads, each number read once; a Triton kernel.

Place in the path: factors -> **here**, on a GPU. One program a token.

Invariants: sums in float32, in a fixed order; no size is chosen by timing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_WARPS = 2


def factor_gradients(grad_BTND: Tensor, a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Gradients of `a` and `b` of `factors.composed`, contiguous.

    Args:    grad_BTND: contiguous; a, b: their last dimension is contiguous, and tokens lie at one stride.
    """
    rows, tokens, heads, width = grad_BTND.shape
    d_a = torch.empty((rows, tokens, heads * rank), dtype=a.dtype, device=a.device)
    d_b = torch.empty((rows, tokens, rank * width), dtype=b.dtype, device=b.device)
    _gradients[(rows * tokens,)](
        grad_BTND, a, b, d_a, d_b, a.stride(1), b.stride(1), HEADS=heads, RANK=rank, WIDTH=width, num_warps=_WARPS
    )
    return d_a, d_b


@triton.jit  # type: ignore[untyped-decorator]
def _gradients(grad, a, b, d_a, d_b, a_stride, b_stride, HEADS: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    head, place = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    slope = tl.load(grad + token * HEADS * WIDTH + head[:, None] * WIDTH + place[None, :]).to(tl.float32) / RANK
    for one in tl.static_range(RANK):
        b_row = tl.load(b + token * b_stride + one * WIDTH + place).to(tl.float32)
        a_column = tl.load(a + token * a_stride + head * RANK + one).to(tl.float32)
        from_b = tl.sum(slope * b_row[None, :], axis=1)
        from_a = tl.sum(slope * a_column[:, None], axis=0)
        tl.store(d_a + token * HEADS * RANK + head * RANK + one, from_b.to(d_a.dtype.element_ty))
        tl.store(d_b + token * RANK * WIDTH + one * WIDTH + place, from_a.to(d_b.dtype.element_ty))
