"""Cross-entropy over a large vocabulary without keeping the logits.

Place in the path: embedded_donor -> **here**. Logits of a few rows at a time are turned into probabilities, and those
into gradients, at once; nothing of size rows x vocabulary outlives its chunk.

Legend: N rows, H hidden, V vocabulary.

Where logits fit into memory chunk by chunk, as on a GPU, one bfloat16 product a chunk is several times faster than the
float32 blocks of `losses`, which are made for a CPU's cache.

Invariants: loss and gradients are those of the mean cross-entropy; logits are computed in the dtype that autocast
asks for, sums over chunks in float32.

Example:
    >>> mean_cross_entropy(torch.zeros(2, 4), torch.zeros(8, 4), torch.tensor([1, 5]), chunk=1).exp().round().item()
    8.0
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import Function


def mean_cross_entropy(hidden_NH: Tensor, head_VH: Tensor, labels_N: Tensor, *, chunk: int) -> Tensor:
    """Mean of -log softmax(hidden head^T)[label] over the rows, in nats; a float32 scalar.

    Args:    chunk: rows of logits in memory at a time; it changes the result by rounding only.
    """
    return cast(Tensor, _MeanCrossEntropy.apply(hidden_NH, head_VH, labels_N, chunk))  # type: ignore[no-untyped-call]


class _MeanCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, head_VH: Tensor, labels_N: Tensor, chunk: int) -> Tensor:
        narrow = torch.is_autocast_enabled(hidden_NH.device.type)
        dtype = torch.get_autocast_dtype(hidden_NH.device.type) if narrow else hidden_NH.dtype
        head = head_VH.detach().to(dtype)
        d_head_VH = torch.zeros(head.shape, dtype=torch.float32, device=head.device)
        d_hidden, losses = [], []
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for rows_CH, labels_C in zip(
                torch.split(hidden_NH.detach(), chunk), torch.split(labels_N, chunk), strict=True
            ):
                rows_CH = rows_CH.to(dtype)
                slope_CV = torch.softmax(rows_CH @ head.T, dim=-1)
                at = (torch.arange(len(labels_C), device=labels_C.device), labels_C)
                losses.append(-slope_CV[at].float().clamp_min(torch.finfo(torch.float32).tiny).log().sum())
                slope_CV[at] -= 1.0
                d_hidden.append(slope_CV @ head)
                d_head_VH += slope_CV.T @ rows_CH
        ctx.save_for_backward(torch.cat(d_hidden), d_head_VH)
        ctx.rows = len(labels_N)
        return torch.stack(losses).sum() / len(labels_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_hidden_NH, d_head_VH = ctx.saved_tensors
        scale = grads[0] / ctx.rows
        return d_hidden_NH.float() * scale, d_head_VH * scale, None, None
