"""Which experts a token goes to, and what a layer's routing comes to in figures.

Place in the path: recipe -> **model**; below moe, which routes, and stream, which carries the figures out.

Invariants: ties go to the lowest index everywhere; only the balance loss carries gradient.

Shapes: B batch, T tokens, N = B * T, E experts, J groups, k experts a token.

Example:
    >>> top_by_index(torch.tensor([0.5, 0.9, 0.9]), 2)
    tensor([1, 2])
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recipes.model.config import MoeConfig


class Routing(NamedTuple):
    """What one MoE layer did with one batch, padding left out; only `balance_loss` carries gradient."""

    counts_E: Tensor  # int64: tokens that chose each expert
    mean_scores_E: Tensor  # mean over tokens of the normalised scores; sums to 1
    score_entropy: Tensor  # mean over tokens of their entropy, nats; ln E if uniform
    balance_loss: Tensor  # weighted; 1e-4 at a uniform router with the locked weight


def top_by_index(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest along the last dimension, largest first; among equals the lowest index wins."""
    chosen, _ = _drawn(values, k)
    return torch.cat(chosen, dim=-1)


def top_mask(values: Tensor, k: int) -> Tensor:
    """True at the k largest along the last dimension; among equals the lowest index wins."""
    _, is_drawn = _drawn(values, k)
    return is_drawn


def _drawn(values: Tensor, k: int) -> tuple[list[Tensor], Tensor]:
    # Comparisons with an index, where a scatter would do: a compiler fuses them, and nothing is written twice.
    index = torch.arange(values.shape[-1], device=values.device)
    is_drawn = torch.zeros_like(values, dtype=torch.bool)
    chosen = []
    for _ in range(k):
        best = values.masked_fill(is_drawn, float("-inf")).argmax(-1, keepdim=True)
        chosen.append(best)
        is_drawn = is_drawn | (index == best)
    return chosen, is_drawn


def counts_of(expert_Nk: Tensor, experts: int, kept_N: Tensor | None = None) -> Tensor:
    """How many tokens chose each expert, int64 [E]; of the kept tokens alone if they are named.

    By comparing: no atomics, and nothing that the host has to wait for.
    """
    is_chosen_NE = (expert_Nk[..., None] == torch.arange(experts, device=expert_Nk.device)).any(1)
    return (is_chosen_NE if kept_N is None else is_chosen_NE & kept_N[:, None]).sum(0)


def top_in_groups(scores_NE: Tensor, *, groups: int, keep: int, k: int) -> Tensor:
    """The top k among the `keep` best groups of consecutive experts.

    A group's score is the sum of its k / keep best; ties go to the lowest index everywhere.
    Source:  DeepSeek-V3, arXiv:2412.19437, with k / keep in the place of its 2.
    """
    grouped_NJe = torch.unflatten(scores_NE, -1, (groups, -1))
    best_NJm = grouped_NJe.gather(-1, top_by_index(grouped_NJe, k // keep))
    kept_NJ = top_mask(best_NJm.sum(-1), keep)
    return top_by_index(grouped_NJe.masked_fill(~kept_NJ[..., None], float("-inf")).flatten(-2), k)


def routing_statistics(
    scores_BTE: Tensor, counts_E: Tensor, moe: MoeConfig, *, kept_BT: Tensor | None = None
) -> Routing:
    """Statistics of one layer's scores.

    The balance loss is weight * mean over rows of E sum_i f_i P_i, with f_i the share of the row's plain top-k
    choices (no bias, no groups) and P_i the row's mean normalised score.

    Args:    counts_E: of the kept tokens. kept_BT: False at padding, which is left out of every mean; None: none.
    Source:  DeepSeek-V3, arXiv:2412.19437 (sequence-wise auxiliary loss).
    """
    share_BTE = scores_BTE / scores_BTE.sum(-1, keepdim=True)
    kept_BT1 = torch.ones_like(share_BTE[..., :1]) if kept_BT is None else kept_BT[..., None].to(share_BTE.dtype)
    tokens_B1 = kept_BT1.sum(1).clamp(min=1)
    kept_BTE = share_BTE * kept_BT1
    hits_BTE = top_mask(share_BTE.detach(), moe.top_k).to(share_BTE.dtype)
    f_BE = (hits_BTE * kept_BT1).sum(1) / (moe.top_k * tokens_B1)
    loss = moe.balance_loss_weight * moe.num_experts * (f_BE * (kept_BTE.sum(1) / tokens_B1)).sum(-1).mean()
    with torch.no_grad():
        entropy = -(torch.xlogy(share_BTE, share_BTE).sum(-1) * kept_BT1[..., 0]).sum() / tokens_B1.sum()
        return Routing(counts_E, kept_BTE.sum((0, 1)) / tokens_B1.sum(), entropy, loss)
