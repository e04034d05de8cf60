"""Experts by grouped matrix products: one product over all experts, rows sorted by expert, nothing asked of the host.

Place in the path: recipe -> **model**; what `moe.Experts` computes expert by expert, in a narrow dtype.

Invariants: gathering and its inverse are both index selections, so nothing is added up by atomics; weights keep their
dtype, their products and gradients are made in the narrow one and summed by the kernel in float32; an expert without a
row gets a gradient of zero.

Shapes: N tokens, k experts a token, M = N * k, E experts, H hidden, F expert width.

Source:  torch.nn.functional.grouped_mm: `offs` ends each group of rows; two flat operands are multiplied group by
group.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from recipes.model.routing import counts_of

# Columns of ones by which a matrix product sums rows: the fewest that keep rows aligned to 16 bytes twice over.
_ONES = 16


class Dispatch(NamedTuple):
    """Where each token's copies go."""

    order_M: Tensor  # int64: the copy (token * k + choice) that each sorted row holds
    back_M: Tensor  # int64: the sorted row of each copy
    expert_M: Tensor  # int64: the expert of each sorted row
    ends_E: Tensor  # int32: where each expert's rows end


def dispatch(expert_Nk: Tensor, experts: int) -> Dispatch:
    """Sort the copies by expert, those of one expert in the order of tokens."""
    expert_M, order_M = torch.sort(expert_Nk.flatten(), stable=True)
    index_M = torch.arange(order_M.shape[0], device=order_M.device)
    back_M = torch.empty_like(order_M).scatter_(0, order_M, index_M)
    return Dispatch(order_M, back_M, expert_M, counts_of(expert_Nk, experts).cumsum(0).to(torch.int32))


class Spread(torch.autograd.Function):
    """Each token's row to the places of its copies; the gradient is the sum over a token's copies, in float32."""

    @staticmethod
    def forward(ctx: Any, x_NH: Tensor, order_M: Tensor, back_M: Tensor) -> Tensor:
        """[N, H] to [M, H], by expert."""
        ctx.save_for_backward(back_M)
        ctx.tokens = x_NH.shape[0]
        return x_NH.index_select(0, order_M // (order_M.shape[0] // x_NH.shape[0]))

    @staticmethod
    def backward(ctx: Any, grad_MH: Tensor) -> tuple[Tensor, None, None]:
        """[M, H] to [N, H]."""
        (back_M,) = ctx.saved_tensors
        copies_NkH = grad_MH.index_select(0, back_M).view(ctx.tokens, -1, grad_MH.shape[-1])
        return copies_NkH.float().sum(1).to(grad_MH.dtype), None, None


class Combine(torch.autograd.Function):
    """sum_i gate_i * row of copy i, for each token, summed in float32 in the order of choice."""

    @staticmethod
    def forward(ctx: Any, y_MH: Tensor, gates_Nk: Tensor, order_M: Tensor, back_M: Tensor) -> Tensor:
        """[M, H] to [N, H]."""
        ctx.save_for_backward(y_MH, gates_Nk, order_M, back_M)
        copies_NkH = y_MH.index_select(0, back_M).view(*gates_Nk.shape, -1)
        return (copies_NkH.float() * gates_Nk[..., None]).sum(1).to(y_MH.dtype)

    @staticmethod
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Gradients of the rows and of the gates."""
        y_MH, gates_Nk, order_M, back_M = ctx.saved_tensors
        rows_MH = grad_NH.index_select(0, order_M // gates_Nk.shape[1]).float()
        d_y_MH = (rows_MH * gates_Nk.flatten()[order_M][:, None]).to(y_MH.dtype)
        copies_NkH = y_MH.index_select(0, back_M).view(*gates_Nk.shape, -1)
        return d_y_MH, (copies_NkH.float() * grad_NH.float()[:, None]).sum(-1), None, None


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MH: Tensor,
        w1_EFH: Tensor,
        b1_EF: Tensor,
        w2_EHF: Tensor,
        b2_EH: Tensor,
        expert_M: Tensor,
        ends_E: Tensor,
    ) -> Tensor:
        dtype = x_MH.dtype
        inner_MF = grouped_mm(x_MH, w1_EFH.to(dtype).mT, offs=ends_E)
        inner_MF = (inner_MF.float() + b1_EF.index_select(0, expert_M)).to(dtype)
        y_MH = grouped_mm(torch.relu(inner_MF).square(), w2_EHF.to(dtype).mT, offs=ends_E)
        ctx.save_for_backward(x_MH, inner_MF, w1_EFH, w2_EHF, ends_E)
        return (y_MH.float() + b2_EH.index_select(0, expert_M)).to(dtype)

    @staticmethod
    def backward(ctx: Any, d_y_MH: Tensor) -> tuple[Tensor | None, ...]:
        x_MH, inner_MF, w1_EFH, w2_EHF, ends_E = ctx.saved_tensors
        dtype = x_MH.dtype
        ones_M1 = torch.ones((x_MH.shape[0], _ONES), dtype=dtype, device=x_MH.device)
        kept_MF = torch.relu(inner_MF)
        d_active_MF = grouped_mm(d_y_MH, w2_EHF.to(dtype), offs=ends_E)
        d_w2_EHF = grouped_mm(d_y_MH.T, kept_MF.square(), offs=ends_E).to(w2_EHF.dtype)
        d_b2_EH = grouped_mm(d_y_MH.T, ones_M1, offs=ends_E)[..., 0].to(w2_EHF.dtype)
        d_inner_MF = (2.0 * d_active_MF.float() * kept_MF.float()).to(dtype)
        d_w1_EFH = grouped_mm(d_inner_MF.T, x_MH, offs=ends_E).to(w1_EFH.dtype)
        d_b1_EF = grouped_mm(d_inner_MF.T, ones_M1, offs=ends_E)[..., 0].to(w1_EFH.dtype)
        d_x_MH = grouped_mm(d_inner_MF, w1_EFH.to(dtype), offs=ends_E)
        return d_x_MH, d_w1_EFH, d_b1_EF, d_w2_EHF, d_b2_EH, None, None


def grouped_experts(x_MH: Tensor, weights: tuple[Tensor, Tensor, Tensor, Tensor], where: Dispatch) -> Tensor:
    """W2 relu(W1 x + b1)^2 + b2 with the weights of each row's expert.

    Args:    x_MH: narrow rows, sorted by expert; weights: fc1 [E, F, H], its bias [E, F], fc2 [E, H, F], its bias.
    Returns: [M, H] in the dtype of the rows; differentiable in rows and weights.
    """
    y_MH: Tensor = _Experts.apply(x_MH, *weights, where.expert_M, where.ends_E)  # type: ignore[no-untyped-call]
    return y_MH
