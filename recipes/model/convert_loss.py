"""Held-out loss of hidden states under a head, and of a unigram model: the yardstick of a conversion.

Place in the path: recipe -> **model**; what convert_dense holds its result against.

Shapes: B batch, T tokens, H hidden, V vocabulary, N tokens of a chunk.

Example:
    >>> mean_loss([hidden_BTH], head_VH, [batch]) < unigram_loss(training, [batch], vocab=201088)
    True
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.data.batches import Batch

_CHUNK = 128  # tokens whose logits are in memory at a time


@torch.no_grad()
def mean_loss(hidden: Sequence[Tensor], head_VH: Tensor, batches: Sequence[Batch]) -> float:
    """Mean cross-entropy over the labels that count, nats a token."""
    total, weight = 0.0, 0.0
    for x_BTH, batch in zip(hidden, batches, strict=True):
        x_NH = x_BTH.flatten(0, 1)
        labels_N, mask_N = (part.flatten().to(x_NH.device) for part in (batch.labels_BT, batch.loss_mask_BT))
        for start in range(0, len(x_NH), _CHUNK):
            part = slice(start, start + _CHUNK)
            loss_N = F.cross_entropy(F.linear(x_NH[part], head_VH).float(), labels_N[part], reduction="none")
            total += float((loss_N.double() * mask_N[part]).sum())
            weight += float(mask_N[part].double().sum())
    return total / weight


def unigram_loss(training: Sequence[Batch], held_out: Sequence[Batch], vocab: int) -> float:
    """Mean cross-entropy of token frequencies counted on other text, nats a token.

    Source:  smoothing of Witten and Bell 1991: tokens never seen get, together, the weight of as many occurrences as
             there are different tokens seen.
    """
    counts_V = torch.zeros(vocab, dtype=torch.float64)
    for batch in training:
        counts_V += torch.bincount(batch.labels_BT[batch.loss_mask_BT > 0], minlength=vocab)
    kinds = (counts_V > 0).sum()
    share_V = (counts_V + kinds / vocab) / (counts_V.sum() + kinds)
    labels = torch.cat([batch.labels_BT[batch.loss_mask_BT > 0] for batch in held_out])
    return -math.fsum(map(math.log, share_V[labels].tolist())) / len(labels)
