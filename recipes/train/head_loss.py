"""Cross-entropy over 201,088 ids in the products of the hidden states' dtype, gradients made on the way forward.

Place in the path: model -> **here** -> loop; for bfloat16, and for every dtype on a GPU. `losses`, whose float32
blocks are made for a CPU's cache, is the reference. Scores of a chunk of tokens are made by one product, turned into
slopes where they lie, and used up by two products more; no second table of that size exists, and the head's gradient
is summed in float32.

Legend: N tokens, H hidden, V vocabulary, C tokens of a chunk.

Invariants: the log of the summed exponentials, each token's loss and the sums over chunks are float32; ids from
`valid_vocab` on are not part of the softmax and get no gradient, yet they stay in the product, whose width is then a
multiple of what matrix units want.

Example:
    >>> hidden, head = torch.zeros(2, 4), torch.zeros(8, 4)
    >>> weighted_losses(hidden, head, torch.tensor([1, 5]), torch.full((2,), 0.5), valid_vocab=8)[0].exp().round()
    tensor(8.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from recipes.train.losses import VALID_VOCAB, require_fit

_CHUNK = 4096


def weighted_losses(
    hidden_NH: Tensor,
    head_VH: Tensor,
    labels_N: Tensor,
    weight_N: Tensor,
    *,
    valid_vocab: int = VALID_VOCAB,
    chunk: int = _CHUNK,
) -> tuple[Tensor, Tensor]:
    """sum_n weight_n * -log softmax(head hidden_n)[label_n] over the valid ids, and each token's own loss, in nats.

    Args:    labels_N: below `valid_vocab`, which is the caller's to see to: asking a GPU would stop it.
             chunk: tokens whose scores are in memory at a time: C * V numbers of the hidden states' dtype.
    Returns: float32 scalar, differentiable in hidden and head; float32 [N] without gradient.
    Raises:  ShapeMismatch: tables that do not fit together.
    """
    require_fit(hidden_NH, head_VH, labels_N, valid_vocab)
    loss, nll_N = _WeightedLoss.apply(hidden_NH, head_VH, labels_N, weight_N, valid_vocab, chunk)  # type: ignore[no-untyped-call]
    return loss, nll_N


class _WeightedLoss(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        head_VH: Tensor,
        labels_N: Tensor,
        weight_N: Tensor,
        valid_vocab: int,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        hidden, head = hidden_NH.detach(), head_VH.detach().to(hidden_NH.dtype)
        d_hidden_NH, d_head_VH = torch.empty_like(hidden), None
        is_head_trained = ctx.needs_input_grad[1]
        nll_N = torch.empty_like(weight_N, dtype=torch.float32)
        buffer = hidden.new_empty((min(chunk, len(labels_N)), head.shape[0]))
        for start in range(0, len(labels_N), chunk):
            part = slice(start, min(start + chunk, len(labels_N)))
            scores_CV = torch.mm(hidden[part], head.T, out=buffer[: part.stop - start])
            nll_N[part] = slopes_in_place(scores_CV, labels_N[part], weight_N[part].float(), valid_vocab)
            torch.mm(scores_CV, head, out=d_hidden_NH[part])
            if is_head_trained:
                d_head_VH = _added(d_head_VH, scores_CV.T, hidden[part])
        if is_head_trained and d_head_VH is None:  # no label counts
            d_head_VH = torch.zeros_like(head_VH, dtype=torch.float32)
        ctx.save_for_backward(d_hidden_NH, d_head_VH)
        ctx.head_dtype = head_VH.dtype
        ctx.mark_non_differentiable(nll_N)
        return torch.dot(nll_N, weight_N.float()), nll_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        d_hidden_NH, d_head_VH = ctx.saved_tensors
        if d_head_VH is not None:  # in place: it is as large as the head, and nobody else holds it
            d_head_VH = d_head_VH.mul_(grads[0]).to(ctx.head_dtype)
        return d_hidden_NH.mul_(grads[0].to(d_hidden_NH.dtype)), d_head_VH, None, None, None, None


def _added(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Total + left right in float32, the product's sums included."""
    if not left.is_cuda or left.dtype == torch.float32:
        product = left.float() @ right.float()
        return product if total is None else total.add_(product)
    if total is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.addmm(total, left, right, out_dtype=torch.float32)


def slopes_in_place(scores_CV: Tensor, labels_C: Tensor, weight_C: Tensor, valid_vocab: int) -> Tensor:
    """Turn scores into weight * (softmax - label), in their own memory.

    Returns: each token's -log softmax at its label, float32 [C].
    """
    if scores_CV.is_cuda:
        from recipes.train.slopes import slopes_on_gpu  # its compiler comes with torch's builds for GPUs only

        return slopes_on_gpu(scores_CV, labels_C, weight_C, valid_vocab)
    scores_CV[:, valid_vocab:] = -torch.inf
    wide_CV = scores_CV.float()
    lse_C = torch.logsumexp(wide_CV, dim=1)
    nll_C = lse_C - wide_CV.gather(1, labels_C[:, None])[:, 0]
    slope_CV = torch.exp(wide_CV - lse_C[:, None])
    slope_CV[torch.arange(len(labels_C)), labels_C] -= 1.0
    scores_CV.copy_(slope_CV * weight_C[:, None])
    return nll_C
