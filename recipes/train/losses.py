"""Cross-entropy over 201,088 ids: chunked, in place, with the gradients made on the way forward.

Place in the path: model -> **losses** -> loop. Tokens come in chunks, the vocabulary in blocks that stay in the cache:
a first pass over the blocks finds each token's normaliser, a second one makes the probabilities again and turns them
into gradients at once. No tensor of size tokens x vocabulary ever exists, and the head's gradient is written once.

Legend: N tokens, H hidden, V vocabulary, C tokens of a chunk, B ids of a block.

Invariants: float32 throughout; ids >= valid_vocab are not part of the softmax and get no gradient; a mean over a span
is a mean over the whole global batch (counted before the first token is computed), so it does not depend on how the
batch is cut into micro-batches; ties for the best id go to the lowest.

Example:
    >>> hidden, head = torch.zeros(2, 4), torch.zeros(8, 4)
    >>> weight = torch.full((2,), 0.5)
    >>> weighted_token_losses(hidden, head, torch.tensor([1, 5]), weight, valid_vocab=8)[0].exp().round().item()
    8.0
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import Function

from recipes.ops.roots import binary_log
from vpstore.errors import RecipeRefused, ShapeMismatch

VALID_VOCAB = 200019  # o200k's ids and its named control tokens; the reserved ids above can never be a label
SPANS = ("plain", "reasoning", "final")  # by the number that the data gives
_CHUNK = 1024
# Elements of one block of scores: on a CPU what stays in the cache, on a GPU what keeps it busy.
_BLOCK_ELEMENTS = {"cpu": 1 << 19}
_BLOCK_ELEMENTS_ELSEWHERE = 1 << 26
_LOG2_E = math.log2(math.e)  # scores are kept in bits inside: exp2 costs a third of exp


@dataclass(frozen=True)
class TokenScores:
    """What a model says of each label, without gradients."""

    nll_N: Tensor  # float32, nats
    best_N: Tensor  # int64, the id with the highest score


def weighted_token_losses(
    hidden_NH: Tensor,
    head_VH: Tensor,
    labels_N: Tensor,
    weight_N: Tensor,
    *,
    valid_vocab: int = VALID_VOCAB,
    chunk: int = _CHUNK,
) -> tuple[Tensor, Tensor]:
    """sum_n weight_n * -log softmax(head hidden_n)[label_n] over the valid ids, and each token's own loss, in nats.

    Args:    weight_N: what each token counts, for instance 1 / (tokens of its span in the global batch).
             chunk: tokens at a time; decides memory and the order of sums, nothing else.
    Returns: float32 scalar, differentiable in hidden and head; float32 [N] without gradient.
    Raises:  RecipeRefused: a label outside the valid ids. ShapeMismatch: tables that do not fit together.
    """
    require_fit(hidden_NH, head_VH, labels_N, valid_vocab)
    require_labels(labels_N, valid_vocab)
    loss, nll_N = _WeightedLoss.apply(hidden_NH, head_VH, labels_N, weight_N, valid_vocab, chunk)  # type: ignore[no-untyped-call]
    return loss, nll_N


def score_tokens(
    hidden_NH: Tensor, head_VH: Tensor, labels_N: Tensor, *, valid_vocab: int = VALID_VOCAB, chunk: int = _CHUNK
) -> TokenScores:
    """Each label's negative log-likelihood, and what the model would have said instead."""
    return TokenScores(*_scores(hidden_NH, head_VH, labels_N, (valid_vocab, chunk), with_best=True))


def token_losses(
    hidden_NH: Tensor, head_VH: Tensor, labels_N: Tensor, *, valid_vocab: int = VALID_VOCAB, chunk: int = _CHUNK
) -> Tensor:
    """Each label's negative log-likelihood alone: float32 [N], nats, without gradient. Cheaper than `score_tokens`."""
    return _scores(hidden_NH, head_VH, labels_N, (valid_vocab, chunk), with_best=False)[0]


@torch.no_grad()
def _scores(
    hidden_NH: Tensor, head_VH: Tensor, labels_N: Tensor, sizes: tuple[int, int], *, with_best: bool
) -> tuple[Tensor, Tensor]:
    valid_vocab, chunk = sizes
    require_fit(hidden_NH, head_VH, labels_N, valid_vocab)
    require_labels(labels_N, valid_vocab)
    head = head_VH[:valid_vocab].float()
    nll_N = torch.zeros(len(labels_N), dtype=torch.float32, device=hidden_NH.device)
    best_N = torch.zeros_like(labels_N)
    for start in range(0, len(labels_N), chunk):
        part = slice(start, start + chunk)
        hidden_CH = hidden_NH[part].float()
        lse_C, best_N[part] = _normaliser(hidden_CH * _LOG2_E, head, with_best=with_best)
        nll_N[part] = lse_C / _LOG2_E - _label_scores(hidden_CH, head, labels_N[part])
    return nll_N, best_N


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
        head = head_VH.detach()[:valid_vocab].float()
        hidden, weight = hidden_NH.detach().float(), weight_N.float()
        d_head = torch.zeros_like(head_VH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        d_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        nll_N = torch.zeros_like(weight)
        for start in range(0, len(labels_N), chunk):
            part = slice(start, start + chunk)
            into = (None if d_hidden is None else d_hidden[part], d_head)
            nll_N[part] = _chunk_gradients(hidden[part], head, labels_N[part], weight[part], into)
        ctx.save_for_backward(d_hidden, d_head)
        ctx.dtypes = (hidden_NH.dtype, head_VH.dtype)
        ctx.mark_non_differentiable(nll_N)
        return torch.dot(nll_N, weight), nll_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        scaled = [
            # In place: the head's gradient alone is as large as the head, and nobody else holds it.
            None if grad is None else grad.mul_(grads[0]).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return scaled[0], scaled[1], None, None, None, None


def _chunk_gradients(
    hidden_CH: Tensor,
    head_VH: Tensor,
    labels_C: Tensor,
    weight_C: Tensor,
    into: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    """Each token's loss; adds the weighted gradients of one chunk to those of its hidden states and of the head."""
    d_hidden_CH, d_head_VH = into
    scaled_CH = hidden_CH * _LOG2_E
    lse_C, _ = _normaliser(scaled_CH, head_VH, with_best=False)
    weighted_CH = hidden_CH * weight_C[:, None]
    if d_hidden_CH is not None or d_head_VH is not None:
        for start, stop, scores_CB in _blocks(scaled_CH, head_VH):
            share_CB = scores_CB.sub_(lse_C[:, None]).exp2_()
            if d_hidden_CH is not None:
                d_hidden_CH.addmm_(share_CB, head_VH[start:stop])
            if d_head_VH is not None:
                d_head_VH[start:stop].addmm_(share_CB.T, weighted_CH)
    if d_hidden_CH is not None:
        d_hidden_CH.sub_(head_VH[labels_C]).mul_(weight_C[:, None])
    if d_head_VH is not None:
        d_head_VH.index_add_(0, labels_C, weighted_CH, alpha=-1)
    return lse_C / _LOG2_E - _label_scores(hidden_CH, head_VH, labels_C)


def _normaliser(scaled_CH: Tensor, head_VH: Tensor, *, with_best: bool) -> tuple[Tensor, Tensor]:
    """log2 of sum over V of 2^score, and the id with the highest score (only if asked for)."""
    top_C = scaled_CH.new_full((scaled_CH.shape[0],), -math.inf)
    total_C = torch.zeros_like(top_C)
    best_C = torch.zeros_like(top_C, dtype=torch.int64)
    for start, _, scores_CB in _blocks(scaled_CH, head_VH):
        if with_best:
            block_C, at_C = scores_CB.max(1)
            best_C = torch.where(block_C > top_C, at_C + start, best_C)
        else:
            block_C = scores_CB.amax(1)
        higher_C = torch.maximum(top_C, block_C)
        share_C = scores_CB.sub_(higher_C[:, None]).exp2_().sum(1)
        total_C = total_C * torch.exp2(top_C - higher_C) + share_C
        top_C = higher_C
    return top_C + binary_log(total_C), best_C


def _blocks(scaled_CH: Tensor, head_VH: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Scores in bits, block by block of ids, in one reused buffer."""
    rows, vocab = scaled_CH.shape[0], head_VH.shape[0]
    elements = _BLOCK_ELEMENTS.get(scaled_CH.device.type, _BLOCK_ELEMENTS_ELSEWHERE)
    width = min(vocab, max(256, elements // max(rows, 1)))
    buffer = scaled_CH.new_empty(rows * width)
    for start in range(0, vocab, width):
        stop = min(start + width, vocab)
        out_CB = buffer[: rows * (stop - start)].view(rows, stop - start)
        yield start, stop, torch.mm(scaled_CH, head_VH[start:stop].T, out=out_CB)


def _label_scores(hidden_CH: Tensor, head_VH: Tensor, labels_C: Tensor) -> Tensor:
    return (hidden_CH * head_VH[labels_C]).sum(1)


def require_fit(hidden_NH: Tensor, head_VH: Tensor, labels_N: Tensor, valid_vocab: int) -> None:
    """Hold the shapes of a loss's tables against each other.

    Raises:  ShapeMismatch: naming what was expected and found.
    """
    if hidden_NH.shape != (len(labels_N), head_VH.shape[1]) or not 0 < valid_vocab <= head_VH.shape[0]:
        raise ShapeMismatch(
            "hidden states, head and labels do not fit together",
            expected=f"hidden [{len(labels_N)}, {head_VH.shape[1]}], at least {valid_vocab} rows in the head",
            found=f"hidden {list(hidden_NH.shape)}, head {list(head_VH.shape)}",
        )


def require_labels(labels_N: Tensor, valid_vocab: int = VALID_VOCAB) -> None:
    """Hold labels against the tokenizer's ids; on the CPU if they are there, as asking a GPU stops it.

    Raises:  RecipeRefused: a label that is no valid id.
    """
    if len(labels_N) and not 0 <= int(labels_N.min()) <= int(labels_N.max()) < valid_vocab:
        raise RecipeRefused(
            "a label is not an id of the tokenizer",
            where="training data",
            expected=f"ids from 0 to {valid_vocab - 1}",
            found=f"{int(labels_N.min())} to {int(labels_N.max())}",
            next_step="build the data set again with this project's tokenizer",
        )


def token_weights(
    span_N: Tensor, counts: tuple[int, ...], *, loss: Literal["plain", "span"], span_weights: tuple[float, ...]
) -> Tensor:
    """What each counted token weighs, so that weights times losses add up to the objective.

    Args:    span_N: span of each counted token. counts: tokens of each span in the global batch.
             loss: `plain` is the mean over all counted tokens; `span` is sum_s span_weights[s] * mean over span s.
    Returns: float32 [N].
    """
    if loss == "plain":
        return torch.full_like(span_N, 1.0 / max(sum(counts), 1), dtype=torch.float32)
    table = [weight / max(count, 1) for weight, count in zip(span_weights, counts, strict=True)]
    return torch.tensor(table, dtype=torch.float32, device=span_N.device)[span_N]
