"""Attention over tiles of queries and the keys that they can see, with a learnable softmax offset.

Place in the path: recipe -> **model**. A causal layer goes in tiles of `QUERY_TILE` queries, so that most of the upper
triangle is never computed; a local layer over long rows goes in blocks, each over itself and the window before it: cost
and memory linear in the tokens.

Invariants: softmax in at least float32; the offset is one more key with logit b_h and value 0, so P_ij = exp(s_ij) /
(exp(b_h) + sum_j exp(s_ij)); a tile's bias hides what is not visible, so tiles and one big mask agree.

Shapes: X leading dimensions (B, or B and blocks N), K KV heads, G query heads a KV head, T queries, S keys, D head
dimension, C key columns (S and the padding that holds the offset).

Example:
    >>> tiles = causal_tiles(heads, state, window=None, slopes_KG=None)
    >>> mixed_BTN = join_tiles([sink_attention(tile, offset_KG) for tile in tiles], tokens=512)
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.model.precision import wide
from recipes.model.stream import Stream, score_bias, visible_keys

# Queries in one causal tile, and in one block of a banded tile.
QUERY_TILE = 128
BAND_BLOCK = 64
# Columns added to the keys: one holds the offset, the others (-inf) keep rows aligned for the matrix products.
SINK_COLUMNS = 16


class Heads(NamedTuple):
    """Queries grouped by the KV head that they share, keys and values: rotated, mixed, ready for scores."""

    q_BTKGD: Tensor
    k_BTKD: Tensor
    v_BTKD: Tensor


class Tile(NamedTuple):
    """Some queries and all keys that any of them sees."""

    q_XKGTD: Tensor
    k_XKSD: Tensor
    v_XKSD: Tensor
    bias: Tensor  # broadcasts to [X, K, G, T, S]


def causal_tiles(heads: Heads, state: Stream, *, window: int | None, slopes_KG: Tensor | None) -> list[Tile]:
    """Tiles of `QUERY_TILE` queries over all keys up to the tile's end."""
    tokens = heads.q_BTKGD.shape[1]
    index_T = torch.arange(tokens, device=heads.q_BTKGD.device)
    tiles = []
    for start in range(0, tokens, QUERY_TILE):
        stop = min(start + QUERY_TILE, tokens)
        bias = state.bias(
            ("causal", start, slopes_KG is not None, window), index_T[start:stop], index_T[:stop], slopes_KG
        )
        k, v = (x[:, :stop].transpose(1, 2) for x in (heads.k_BTKD, heads.v_BTKD))
        tiles.append(Tile(heads.q_BTKGD[:, start:stop].permute(0, 2, 3, 1, 4), k, v, bias))
    return tiles


def banded_tiles(heads: Heads, state: Stream, *, window: int) -> list[Tile]:
    """One tile with a block dimension: blocks of `BAND_BLOCK` queries, each over its own keys and the window before."""
    tokens = heads.q_BTKGD.shape[1]
    blocks = -(-tokens // BAND_BLOCK)
    q, k, v = (F.pad(x, (0, 0) * (x.dim() - 2) + (0, blocks * BAND_BLOCK - tokens)) for x in heads)
    q_XKGTD = torch.unflatten(q, 1, (blocks, BAND_BLOCK)).permute(0, 1, 3, 4, 2, 5)
    k_XKSD, v_XKSD = (_behind_window(x, window).transpose(2, 3) for x in (k, v))
    return [Tile(q_XKGTD, k_XKSD, v_XKSD, _banded_bias(state, blocks, window))]


def _behind_window(x_BTKD: Tensor, window: int) -> Tensor:
    """Each block's tokens behind the blocks that its window reaches into; zeros before the first: [B, N, S, K, D]."""
    reach = -(-window // BAND_BLOCK)
    padded_BNTKD = torch.unflatten(F.pad(x_BTKD, (0, 0, 0, 0, reach * BAND_BLOCK, 0)), 1, (-1, BAND_BLOCK))
    blocks = padded_BNTKD.shape[1] - reach
    return torch.cat([padded_BNTKD[:, shift : shift + blocks] for shift in range(reach + 1)], dim=2)


def _banded_bias(state: Stream, blocks: int, window: int) -> Tensor:
    """Bias of the banded tile, [B or 1, N, 1, 1, T, S], made once a batch."""
    key = ("banded", window)
    if key not in state.shared:
        device, tokens = state.positions_BT.device, state.positions_BT.shape[-1]
        reach = -(-window // BAND_BLOCK) * BAND_BLOCK
        first_N1 = torch.arange(blocks, device=device)[:, None] * BAND_BLOCK
        rows_NT = first_N1 + torch.arange(BAND_BLOCK, device=device)
        keys_NS = first_N1 + torch.arange(-reach, BAND_BLOCK, device=device)
        visible = visible_keys(rows_NT, keys_NS, window=window)[None]
        if state.run_BT is not None:
            # Queries behind the row's end are padding: one more run, whose outputs are cut off again.
            run_BT = F.pad(state.run_BT, (0, blocks * BAND_BLOCK - tokens), value=-1)
            visible = visible & (run_BT[:, rows_NT, None] == run_BT[:, keys_NS.clamp(min=0)][:, :, None])
        state.shared[key] = score_bias(visible, rows_NT[:, :, None] - keys_NS[:, None], None)
    return state.shared[key]


def sink_attention(tile: Tile, offset_KG: Tensor) -> Tensor:
    """Softmax attention with the offset as an extra logit of value 0.

    Returns: [X, K, G, T, D] in the dtype of the values. Differentiable in all but the bias.
    """
    k, v = (F.pad(x, (0, 0, 0, SINK_COLUMNS)) for x in (tile.k_XKSD, tile.v_XKSD))
    logits: Tensor = _AddBias.apply(_scores(tile.q_XKGTD, k), tile.bias, offset_KG)  # type: ignore[no-untyped-call]
    mixed = torch.matmul(torch.softmax(logits, dim=-1).to(v.dtype), v)
    return torch.unflatten(mixed, -2, tile.q_XKGTD.shape[-3:-1])


def log_sum_exp(tile: Tile) -> Tensor:
    """Log of the summed exponentials of a tile's visible scores, without the offset: [X, K, G, T]."""
    scores = torch.unflatten(_scores(tile.q_XKGTD, tile.k_XKSD), -2, tile.q_XKGTD.shape[-3:-1])
    return torch.logsumexp(wide(scores) + tile.bias, dim=-1)


def join_tiles(outputs: list[Tensor], *, tokens: int) -> Tensor:
    """Put outputs [X, K, G, T, D] of all tiles behind each other, drop padding: [B, T, K * G * D]."""
    rows = [out.movedim(-2, -4).flatten(-3).flatten(1, -2) for out in outputs]
    return (rows[0] if len(rows) == 1 else torch.cat(rows, dim=1))[:, :tokens]


def _scores(q_XKGTD: Tensor, k_XKCD: Tensor) -> Tensor:
    """q.k / sqrt(D), one matrix product for all query heads of a KV head: [X, K, G * T, C]."""
    scaled = q_XKGTD * (1.0 / math.sqrt(q_XKGTD.shape[-1]))
    scores: Tensor = torch.matmul(scaled.flatten(-3, -2), k_XKCD.transpose(-1, -2))
    return scores


class _AddBias(torch.autograd.Function):
    """scores + bias over the real keys, the offset in the first padding column, -inf in the rest; in place if float32.

    A function of its own, because autograd would copy the scores once to write a column and once to sum its gradient.
    """

    @staticmethod
    def forward(ctx: Any, scores_XKRC: Tensor, bias_XKGTS: Tensor, offset_KG: Tensor) -> Tensor:
        ctx.keys, ctx.rows = bias_XKGTS.shape[-1], (offset_KG.shape[-1], bias_XKGTS.shape[-2])
        ctx.dtype, ctx.offset_dtype = scores_XKRC.dtype, offset_KG.dtype
        logits = wide(scores_XKRC)
        if logits is scores_XKRC:
            ctx.mark_dirty(scores_XKRC)
        grouped_XKGTC = torch.unflatten(logits, -2, ctx.rows)
        grouped_XKGTC[..., : ctx.keys].add_(bias_XKGTS)
        grouped_XKGTC[..., ctx.keys] = offset_KG[..., None]
        grouped_XKGTC[..., ctx.keys + 1 :] = -math.inf
        return logits

    @staticmethod
    def backward(ctx: Any, grad_XKRC: Tensor) -> tuple[Tensor, None, Tensor]:
        column_XKGT = torch.unflatten(grad_XKRC[..., ctx.keys], -1, ctx.rows)
        over = [*range(column_XKGT.dim() - 3), column_XKGT.dim() - 1]
        return grad_XKRC.to(ctx.dtype), None, column_XKGT.sum(over).to(ctx.offset_dtype)
