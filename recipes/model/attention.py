"""Attention of one layer: from the normalised stream to q, k, v, to mixed values, to the stream.

Place in the path: recipe -> **model**. Three steps that surgery can call one by one: `project` (projection, bias,
QK-norm), `attend` (rotation, value residual, scores, softmax with offset, mixing), `o_proj`.

Invariants: the fused projection is laid out per KV group, [Q0..Q3 K0 V0 | Q4..Q7 K1 V1] (T1); values are never
normalised; the offset and the value residual's logit stay float32 (a neutral offset is very negative, never 0: T3).

Shapes: B batch, T tokens, H hidden, Q query heads, K KV heads, G = Q / K, D head dimension, N = Q * D.

Example:
    >>> q, k, v = layer.self_attn.project(x_BTH)
    >>> y_BTH = layer.self_attn.o_proj(layer.self_attn.attend(q, k, v, state))
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from recipes.model import flex
from recipes.model.config import StudentConfig
from recipes.model.grape import alibi_slopes, rotate
from recipes.model.modules import Projection, RmsNorm
from recipes.model.precision import KeepsFloat32, wide
from recipes.model.stream import Stream, score_bias
from recipes.model.tiles import Heads, Tile, banded_tiles, causal_tiles, join_tiles, log_sum_exp, sink_attention
from vpstore.errors import RecipeRefused

# Where a fresh layer starts: the offset takes no mass, and the own values count almost alone (sigmoid(4) = 0.982).
NEUTRAL_OFFSET = -10.0
FRESH_RESIDUAL_LOGIT = 4.0


class Attention(KeepsFloat32):
    """What all layers share; subclasses say how q, k and v are made."""

    value_residual: nn.Parameter | None

    pinned: ClassVar[tuple[str, ...]] = ("softmax_offset", "value_residual")

    def __init__(self, config: StudentConfig, *, number: int) -> None:
        super().__init__()
        self.config, self.number = config, number
        self.window = config.layer_window(number)
        self.uses_rotary = config.uses_rotary(number)
        self.uses_alibi = config.uses_alibi(number)
        self.o_proj = Projection(config.num_query_heads * config.head_dim, config.hidden_size)
        self.q_norm = RmsNorm(config.head_dim, eps=config.norm_eps)
        self.k_norm = RmsNorm(config.head_dim, eps=config.norm_eps)
        self.softmax_offset = nn.Parameter(torch.full((config.num_query_heads,), NEUTRAL_OFFSET))
        residual = nn.Parameter(torch.tensor(FRESH_RESIDUAL_LOGIT)) if number > 1 else None
        self.register_parameter("value_residual", residual)

    def raw_qkv(self, x_BTH: Tensor) -> Tensor:
        """The fused projection with its bias, per KV group: [B, T, (Q + 2 K) * D]."""
        raise NotImplementedError

    def project(self, x_BTH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys after their norm and before rotation, and values.

        Args:    x_BTH: the layer's input after `input_layernorm`.
        Returns: q [B, T, Q, D], k [B, T, K, D], v [B, T, K, D]. Query head h shares KV head h // G.
        """
        q_BTQD, k_BTKD, v_BTKD = self.raw_heads(x_BTH)
        return self.q_norm(q_BTQD), self.k_norm(k_BTKD), v_BTKD

    def raw_heads(self, x_BTH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values with their bias, before any norm; shapes as of `project`."""
        groups = self.config.num_kv_heads
        grouped = torch.unflatten(self.raw_qkv(x_BTH), -1, (groups, -1, self.config.head_dim))
        q_BTKGD, k, v = torch.split(grouped, [self.config.num_query_heads // groups, 1, 1], dim=-2)
        return q_BTKGD.flatten(-3, -2), k.squeeze(-2), v.squeeze(-2)

    def attend(self, q_BTQD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, state: Stream) -> Tensor:
        """Mixed values of all heads, concatenated: what `o_proj` multiplies.

        Layer 1 publishes its values in `state.v1_BTKD`; the others mix theirs with them.
        Raises:  RecipeRefused: a layer above the first before layer 1 has run on this state.
        """
        v_BTKD = self.mix_values(v_BTKD, state)
        q_BTQD, k_BTKD = self._rotated(q_BTQD, k_BTKD, state)
        if state.masks is not None:
            mask = state.masks.of(self.window)
            return flex.sink_attention((q_BTQD, k_BTKD, v_BTKD), self.softmax_offset, mask, uses_alibi=self.uses_alibi)
        offset_KG = torch.unflatten(self.softmax_offset, 0, (self.config.num_kv_heads, -1))
        if state.cache is not None and state.cache.is_filled:
            tiles = [self._recalled(q_BTQD, k_BTKD, v_BTKD, state)]
        else:
            tiles = self._tiles(q_BTQD, k_BTKD, v_BTKD, state)
            if state.cache is not None:
                state.cache.fill(self.number, k_BTKD, v_BTKD, window=self.window)
        return join_tiles([sink_attention(tile, offset_KG) for tile in tiles], tokens=q_BTQD.shape[1])

    def log_sum_exp(self, q_BTQD: Tensor, k_BTKD: Tensor, state: Stream) -> Tensor:
        """Log of the mass that each query's visible keys have, the offset left out.

        Returns: [B, T, Q], at least float32.
        Raises:  RecipeRefused: a rotating layer, and a state without rotary tables.
        """
        q_BTQD, k_BTKD = self._rotated(q_BTQD, k_BTKD, state)
        tiles = self._tiles(q_BTQD, k_BTKD, k_BTKD, state)
        return join_tiles([log_sum_exp(tile)[..., None] for tile in tiles], tokens=q_BTQD.shape[1])

    def mix_values(self, v_BTKD: Tensor, state: Stream) -> Tensor:
        """Publish the values (layer 1), or lambda * v + (1 - lambda) * v1 with lambda = sigmoid(logit).

        Returns: same shape and dtype; computed in at least float32.
        Raises:  RecipeRefused: a layer above the first before layer 1 has run on this state.
        """
        if self.value_residual is None:
            state.v1_BTKD = wide(v_BTKD)  # all layers' gradients meet here, and are summed in this dtype
            return v_BTKD
        if state.v1_BTKD is None:
            raise RecipeRefused(
                "a layer asks for the first layer's values before it has run",
                where=f"attention of layer {self.number}",
                expected="state.v1_BTKD from layer 1 on the same batch",
                next_step="run layer 1 with this state first",
            )
        share = wide(torch.sigmoid(self.value_residual))
        return (share * wide(v_BTKD) + (1 - share) * wide(state.v1_BTKD)).to(v_BTKD.dtype)

    def forward(self, x_BTH: Tensor, state: Stream) -> Tensor:
        """What the layer adds to the stream."""
        q, k, v = self.project(x_BTH)
        mixed_BTH: Tensor = self.o_proj(self.attend(q, k, v, state))
        return mixed_BTH

    def _tiles(self, q_BTQD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, state: Stream) -> list[Tile]:
        """Group by KV head, and cut: banded where a window is much shorter than the row."""
        heads = Heads(torch.unflatten(q_BTQD, 2, (self.config.num_kv_heads, -1)), k_BTKD, v_BTKD)
        if self.window is not None and q_BTQD.shape[1] > 2 * self.window:
            return banded_tiles(heads, state, window=self.window)
        return causal_tiles(heads, state, window=self.window, slopes_KG=self._slopes(q_BTQD.device))

    def _recalled(self, q_B1QD: Tensor, k_B1KD: Tensor, v_B1KD: Tensor, state: Stream) -> Tile:
        """One token a row over those before it, which the cache holds."""
        assert state.cache is not None
        kept = state.cache.extend(self.number, k_B1KD, v_B1KD, window=self.window)
        key = ("recalled", self.uses_alibi, self.window)
        if key not in state.shared:
            distance_B1S = state.positions_BT[:, :, None] - kept.position_BS[:, None]
            is_there = (kept.position_BS >= 0)[:, None]
            state.shared[key] = score_bias(is_there, distance_B1S[:, None, None], self._slopes(q_B1QD.device))
        q_XKGTD = torch.unflatten(q_B1QD, 2, (self.config.num_kv_heads, -1)).permute(0, 2, 3, 1, 4)
        return Tile(q_XKGTD, kept.k_BKSD, kept.v_BKSD, state.shared[key])

    def _slopes(self, device: torch.device) -> Tensor | None:
        """ALiBi's slopes by KV head and query head, where this layer has them."""
        if not self.uses_alibi:
            return None
        return torch.unflatten(
            alibi_slopes(self.config.num_query_heads, device=device), 0, (self.config.num_kv_heads, -1)
        )

    def _rotated(self, q_BTQD: Tensor, k_BTKD: Tensor, state: Stream) -> tuple[Tensor, Tensor]:
        """Queries and keys at their positions, where this layer rotates."""
        if not self.uses_rotary:
            return q_BTQD, k_BTKD
        if state.rotary is None:
            raise RecipeRefused(
                "a rotating layer has no rotary tables",
                where=f"attention of layer {self.number}",
                next_step="make the state with Student.start",
            )
        return rotate(q_BTQD, state.rotary), rotate(k_BTKD, state.rotary)


class GroupedQueryAttention(Attention):
    """q, k and v from one fused matrix."""

    def __init__(self, config: StudentConfig, *, number: int) -> None:
        super().__init__(config, number=number)
        self.qkv_proj = Projection(config.hidden_size, config.qkv_rows)

    def raw_qkv(self, x_BTH: Tensor) -> Tensor:
        """One matrix product."""
        fused: Tensor = self.qkv_proj(x_BTH)
        return fused

    def draw(self, generator: Generator | None = None) -> None:
        """Offset and residual start at their constants; nothing random."""
        reset_constants(self)


def reset_constants(attention: Attention) -> None:
    """Put the offset and the residual's logit where a fresh layer starts."""
    nn.init.constant_(attention.softmax_offset, NEUTRAL_OFFSET)
    if attention.value_residual is not None:
        nn.init.constant_(attention.value_residual, FRESH_RESIDUAL_LOGIT)
