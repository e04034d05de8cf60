"""Tensor-product attention: q, k and v as products of two factors that both depend on the token.

Place in the path: recipe -> **model**; the local layers of real mode. Per token q = (1/R_q) A_q B_q with A_q [heads,
rank] and B_q [rank, D]; k and v likewise with the KV heads and their rank.

Invariants: rows of a_* are (head, rank), rows of b_* are (rank, dimension), row-major; no bias in any factor; one bias
is added to the composed result in the fused per-group layout.

Shapes: B batch, T tokens, H hidden, R rank, D head dimension.

Example:
    >>> TensorProductAttention(config, number=1).a_q.weight.shape
    torch.Size([32, 64])
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from recipes.model.attention import Attention, reset_constants
from recipes.model.config import StudentConfig
from recipes.model.factors import composed
from recipes.model.modules import Projection
from recipes.model.precision import is_narrow


class TensorProductAttention(Attention):
    """q, k and v from factors.

    Source:  Zhang et al. 2025, arXiv:2501.06425 (contextual factors, 1/R scaling).
    """

    def __init__(self, config: StudentConfig, *, number: int) -> None:
        super().__init__(config, number=number)
        hidden, width = config.hidden_size, config.head_dim
        self.a_q = Projection(hidden, config.num_query_heads * config.query_rank, bias=False)
        self.a_k = Projection(hidden, config.num_kv_heads * config.kv_rank, bias=False)
        self.a_v = Projection(hidden, config.num_kv_heads * config.kv_rank, bias=False)
        self.b_q = Projection(hidden, config.query_rank * width, bias=False)
        self.b_k = Projection(hidden, config.kv_rank * width, bias=False)
        self.b_v = Projection(hidden, config.kv_rank * width, bias=False)
        self.qkv_bias = nn.Parameter(torch.zeros(config.qkv_rows))

    def raw_qkv(self, x_BTH: Tensor) -> Tensor:
        """Compose, put the heads of each KV group side by side, add the bias."""
        config = self.config
        q = compose(self.a_q(x_BTH), self.b_q(x_BTH), rank=config.query_rank)
        k = compose(self.a_k(x_BTH), self.b_k(x_BTH), rank=config.kv_rank)
        v = compose(self.a_v(x_BTH), self.b_v(x_BTH), rank=config.kv_rank)
        groups = [torch.unflatten(part, 2, (config.num_kv_heads, -1)) for part in (q, k, v)]
        return torch.cat(groups, dim=3).flatten(2) + self.qkv_bias

    def raw_heads(self, x_BTH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """In a narrow dtype one product for all six factors, composed elementwise: a compiler fuses what follows."""
        if not is_narrow(x_BTH.dtype):
            return super().raw_heads(x_BTH)
        factors = (self.a_q, self.a_k, self.a_v, self.b_q, self.b_k, self.b_v)
        weight = torch.cat([factor.weight for factor in factors]).to(x_BTH.dtype)
        parts = torch.split(F.linear(x_BTH, weight), [factor.out_features for factor in factors], dim=-1)
        heads, groups = self.config.num_query_heads, self.config.num_kv_heads
        bias_KSD = torch.unflatten(self.qkv_bias, 0, (groups, -1, self.config.head_dim))
        biases = torch.split(bias_KSD, [heads // groups, 1, 1], dim=1)
        ranks = (self.config.query_rank, self.config.kv_rank, self.config.kv_rank)
        q, k, v = (
            composed(a, b, bias.flatten(0, 1), rank=rank)
            for a, b, rank, bias in zip(parts[:3], parts[3:], ranks, biases, strict=True)
        )
        return q, k, v

    def draw(self, generator: Generator | None = None) -> None:
        """Constants start as in every layer, the composed bias at zero; nothing random."""
        reset_constants(self)
        nn.init.zeros_(self.qkv_bias)


def compose(a: Tensor, b: Tensor, *, rank: int) -> Tensor:
    """(1/R) A B for each token.

    Args:    a: [B, T, heads * R], rows (head, rank); b: [B, T, R * D], rows (rank, dimension).
    Returns: [B, T, heads, D], in the dtype of `a`.
    """
    return torch.matmul(torch.unflatten(a, -1, (-1, rank)), torch.unflatten(b, -1, (rank, -1))) / rank
