"""Scores into the slopes of the loss, one pass to read and one to write, in their own memory; a Triton kernel.

Place in the path: head_loss -> **here**, on a GPU. One program a token: a running maximum and sum over blocks of ids,
then the same blocks again, each read, turned into weight * (softmax - label) and written where it lay.

Invariants: everything is computed in float32 and in bits (exp2 costs less than exp); one program owns its row, and
blocks come in order, so equal scores give equal slopes; no size is chosen by timing.

Source:  Milakov and Gimelshein 2018, arXiv:1805.02867 (the running normaliser).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Ids that a program holds at a time, and the warps that share them.
_BLOCK, _WARPS = 8192, 16
_LN_2 = math.log(2)


def slopes_on_gpu(scores_CV: Tensor, labels_C: Tensor, weight_C: Tensor, valid_vocab: int) -> Tensor:
    """As `head_loss.slopes_in_place`; the rows of `scores_CV` are contiguous."""
    tokens, vocab = scores_CV.shape
    nll_C = torch.empty(tokens, dtype=torch.float32, device=scores_CV.device)
    if tokens:
        _slopes[(tokens,)](
            scores_CV,
            labels_C,
            weight_C,
            nll_C,
            scores_CV.stride(0),
            vocab,
            valid_vocab,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
    return nll_C.mul_(_LN_2)


@triton.jit  # type: ignore[untyped-decorator]
def _slopes(scores, labels, weights, bits, stride, vocab, valid, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    scores += row * stride
    label = tl.load(labels + row)
    weight = tl.load(weights + row)
    # Before the first block's barriers: the last loop overwrites it.
    at_label = tl.load(scores + label).to(tl.float32) * 1.4426950408889634
    top = -float("inf")
    total = 0.0
    for start in range(0, valid, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        score = tl.load(scores + ids, mask=ids < valid, other=-float("inf")).to(tl.float32) * 1.4426950408889634
        higher = tl.maximum(top, tl.max(score, axis=0))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(score - higher), axis=0)
        top = higher
    mass = top + tl.log(total) * 1.4426950408889634
    tl.store(bits + row, mass - at_label)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        score = tl.load(scores + ids, mask=ids < valid, other=-float("inf")).to(tl.float32) * 1.4426950408889634
        slope = (tl.exp2(score - mass) - tl.where(ids == label, 1.0, 0.0)) * weight
        tl.store(scores + ids, slope.to(scores.dtype.element_ty), mask=ids < vocab)
