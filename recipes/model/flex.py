"""Attention by FlexAttention, for a GPU: document-bounded, causal or windowed, with the learnable softmax offset.

Place in the path: recipe -> **model**; what `tiles` computes, by one kernel that never writes the scores. Block masks
are made once a batch from the documents' runs alone, without looking at a single score.

Invariants: the mask is that of `stream.visible_keys` within a run; a query always sees itself, so every row has a
mass; the offset comes in behind the kernel: softmax over keys and offset = softmax over keys * sigmoid(LSE - offset),
which is P_ij = exp(s_ij) / (exp(b_h) + sum_j exp(s_ij)) exactly. FlexAttention has no backward on a CPU: there
`tiles` serves.

Shapes: B batch, T tokens, Q query heads, K KV heads, D head dimension, N blocks of `BLOCK` tokens.

Example:
    masks = block_masks(state.run_BT, rows=8, tokens=2048, window=128, device=device)
    mixed_BTN = sink_attention(Heads(q, k, v), offset_Q, masks.window, uses_alibi=False)

Source:  Dong et al. 2024, arXiv:2412.05496 (FlexAttention).
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from recipes.model.precision import wide

BLOCK = 128


class Masks(NamedTuple):
    """What the layers of one batch see."""

    causal: BlockMask
    window: BlockMask | None

    def of(self, window: int | None) -> BlockMask:
        """The mask of a layer with or without a window; the windows of one model are all alike."""
        return self.causal if window is None or self.window is None else self.window


def block_masks(run_BT: Tensor | None, *, rows: int, tokens: int, window: int | None, device: torch.device) -> Masks:
    """The masks of one batch.

    Args:    run_BT: number of the document within its row, never falling; None: a row is one document.
             window: of the local layers, the query itself counted; None: there are none.
    """
    if run_BT is None:
        run_BT = torch.zeros((rows, tokens), dtype=torch.int64, device=device)
    causal = _block_mask(run_BT, None)
    return Masks(causal, None if window is None else _block_mask(run_BT, window))


def _block_mask(run_BT: Tensor, window: int | None) -> BlockMask:
    """Blocks that are seen in part, and blocks that are seen whole, by their corners: runs never fall along a row.

    The nearest pair of a query block and an earlier key block is (first query, last key), the farthest (last, first).
    """
    tokens = run_BT.shape[1]
    first_N = torch.arange(0, tokens, BLOCK, device=run_BT.device)
    last_N = (first_N + BLOCK - 1).clamp(max=tokens - 1)
    start_BN, end_BN = run_BT[:, first_N], run_BT[:, last_N]
    is_earlier_NN = first_N[None, :] < first_N[:, None]
    touches_BNN = is_earlier_NN & (end_BN[:, None, :] == start_BN[:, :, None])
    is_whole_BNN = is_earlier_NN & (start_BN[:, None, :] == end_BN[:, :, None])
    if window is not None:
        touches_BNN = touches_BNN & (first_N[:, None] - last_N[None, :] < window)
        is_whole_BNN = is_whole_BNN & (last_N[:, None] - first_N[None, :] < window)
    is_diagonal_NN = first_N[None, :] == first_N[:, None]
    partial = (touches_BNN & ~is_whole_BNN) | is_diagonal_NN

    def is_visible(b: Tensor, _: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = (i >= j) & (run_BT[b, i] == run_BT[b, j])
        return seen if window is None else seen & (i - j < window)

    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(is_whole_BNN), BLOCK_SIZE=BLOCK, mask_mod=is_visible, seq_lengths=(tokens, tokens)
    )


def _listed(wanted_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block has, and their numbers first in the list: int32 [B, 1, N], [B, 1, N, N]."""
    order_BNN = torch.sort(wanted_BNN.to(torch.int8), dim=-1, descending=True, stable=True).indices
    return wanted_BNN.sum(-1).to(torch.int32)[:, None], order_BNN.to(torch.int32)[:, None]


def _alibi(score: Tensor, _b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """The slopes of `grape.alibi_slopes`: 2^-(h + 1)."""
    return score - torch.exp2(-(h + 1.0)) * (i - j)


def sink_attention(
    heads: tuple[Tensor, Tensor, Tensor], offset_Q: Tensor, mask: BlockMask, *, uses_alibi: bool
) -> Tensor:
    """Softmax attention with the offset as an extra logit of value 0.

    Args:    heads: q [B, T, Q, D], k and v [B, T, K, D], rotated and mixed.
    Returns: [B, T, Q * D] in the dtype of the values; differentiable in all tensors.
    """
    q, k, v = (x.transpose(1, 2) for x in heads)
    mixed_BQTD, aux = flex_attention(
        q,
        k,
        v,
        score_mod=_alibi if uses_alibi else None,
        block_mask=mask,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
        # Rows shorter than a block would get the kernel for decoding; it packs the query heads of a KV head into one
        # block, which is not the block that the mask is made of.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True} if q.shape[2] < BLOCK else None,
    )
    share_BQT = torch.sigmoid(wide(cast(Tensor, aux.lse)) - offset_Q[:, None])
    return (wide(mixed_BQTD) * share_BQT[..., None]).to(v.dtype).transpose(1, 2).flatten(2)
