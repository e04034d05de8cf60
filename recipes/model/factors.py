"""Heads composed of two factors and a bias, elementwise, for a narrow dtype: forward to be fused, backward in one pass.

Place in the path: recipe -> **model**; what `tpa.compose` does by a small matrix product for every token. Such
products are too small for matrix units; as sums of outer products they are bound by memory alone, if each number is
read once.

Invariants: sums in float32; the gradient of each token's factors is its own, so nothing is added up by atomics; on a
CPU the backward pass is plain torch, which the kernel is held against.

Shapes: B batch, T tokens, N heads, R rank, D head dimension.

Example:
    >>> composed(torch.ones(1, 1, 4), torch.ones(1, 1, 6), torch.zeros(2, 3), rank=2).shape
    torch.Size([1, 1, 2, 3])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def composed(a: Tensor, b: Tensor, bias_ND: Tensor, *, rank: int) -> Tensor:
    """(1/R) A B + bias for each token.

    Args:    a: [B, T, N * R], rows (head, rank); b: [B, T, R * D], rows (rank, dimension).
    Returns: [B, T, N, D] in the dtype of `a`; differentiable in all three.
    """
    out_BTND: Tensor = _Composed.apply(a, b, bias_ND, rank)  # type: ignore[no-untyped-call]
    return out_BTND


class _Composed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias_ND: Tensor, rank: int) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.rank = rank
        a_BTNR, b_BTRD = torch.unflatten(a.float(), -1, (-1, rank)), torch.unflatten(b.float(), -1, (rank, -1))
        total = a_BTNR[..., 0, None] * b_BTRD[..., 0, None, :]
        for one in range(1, rank):
            total = total + a_BTNR[..., one, None] * b_BTRD[..., one, None, :]
        return (total / rank + bias_ND).to(a.dtype)

    @staticmethod
    def backward(ctx: Any, grad_BTND: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        if grad_BTND.is_cuda:
            from recipes.model.factor_kernel import factor_gradients  # its compiler comes with builds for GPUs only

            d_a, d_b = factor_gradients(grad_BTND.contiguous(), a, b, ctx.rank)
        else:
            a_BTNR, b_BTRD = (
                torch.unflatten(a.float(), -1, (-1, ctx.rank)),
                torch.unflatten(b.float(), -1, (ctx.rank, -1)),
            )
            wide_BTND = grad_BTND.float() / ctx.rank
            d_a = (wide_BTND @ b_BTRD.mT).flatten(-2).to(a.dtype)
            d_b = (a_BTNR.mT @ wide_BTND).flatten(-2).to(b.dtype)
        return d_a, d_b, grad_BTND.float().sum((0, 1)), None
