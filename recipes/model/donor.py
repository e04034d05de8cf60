"""The donor: Qwen3's dense architecture in plain PyTorch, under Hugging Face's parameter names.

Place in the path: **recipe**. The real donor and the embedded one are this class; surgery walks it layer by layer
(`start`, then each of `model.layers`) and takes attention and feed-forward apart through their named steps.

Legend: B batch, T tokens, N query heads, K key/value heads, D head width, H hidden, F feed-forward, V vocabulary.

Invariants: `state_dict()` has exactly the names of a stock Qwen3 checkpoint (`lm_head.weight` only if the head is not
tied); norms, rotary angles and their application to float32 input are float32; a token sees its own document only,
and positions start at 0 in each document. A document is a run of equal numbers within a row.

Example:
    >>> donor = Donor(DonorConfig(hidden_size=8, num_hidden_layers=1, intermediate_size=8, vocab_size=32))
    >>> donor(torch.zeros(1, 5, dtype=torch.long)).shape
    torch.Size([1, 5, 32])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.model.config import DonorConfig
from recipes.model.modules import Projection
from recipes.model.precision import REFERENCE, Numerics
from recipes.model.stream import Stream

MAX_POSITIONS: Final = 40960  # as Qwen3's config.json says


@dataclass(frozen=True)
class DonorState:
    """What every layer needs beside the stream: rotary factors, and which keys a query may see."""

    cos_BTD: Tensor
    sin_BTD: Tensor
    allowed_B1TT: Tensor | None  # [query, key]; None: plain causal, one document a row


def positions_within(documents_BT: Tensor) -> Tensor:
    """Position of each token inside its document.

    Args:    documents_BT: integers; a document is a run of equal numbers, so a number that returns later starts anew.
    Returns: int64 [B, T], 0 at each document's first token.
    """
    steps_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    is_start_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    is_start_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    starts_BT = torch.where(is_start_BT, steps_T, 0).cummax(dim=1).values
    return steps_T - starts_BT


def document_mask(documents_BT: Tensor) -> Tensor:
    """Which keys a query may see: its own document's, up to itself.

    Args:    documents_BT: integers; a document is a run of equal numbers.
    Returns: bool [B, 1, T, T], indexed [query, key].
    """
    tokens = documents_BT.shape[1]
    first_BT = torch.arange(tokens, device=documents_BT.device) - positions_within(documents_BT)
    same_BTT = first_BT[:, :, None] == first_BT[:, None, :]
    causal_TT = torch.ones(tokens, tokens, dtype=torch.bool, device=documents_BT.device).tril()
    return (same_BTT & causal_TT)[:, None]


def rotary_factors(positions_BT: Tensor, config: DonorConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, both halves alike.

    Args:    positions_BT: within-document positions.
    Returns: two tensors [B, T, D] in `dtype`; angles are computed in float32.
    Source:  Su et al. 2021, arXiv:2104.09864; half-split pairing (i, i + D/2) as in Qwen3.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions_BT.device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    angles_BTD = (positions_BT[..., None].float() * frequencies).repeat(1, 1, 2)
    return angles_BTD.cos().to(dtype), angles_BTD.sin().to(dtype)


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32, back in x's dtype before the gain, as the stock model rounds."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        wide = x.float()
        unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * unit.to(x.dtype)


class DonorAttention(nn.Module):
    """Grouped-query attention with per-head norms on queries and keys, in steps that surgery can call one by one."""

    def __init__(self, config: DonorConfig) -> None:
        super().__init__()
        self.config = config
        hidden, width = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
        self.q_proj = Projection(hidden, queries, bias=False)
        self.k_proj = Projection(hidden, keys, bias=False)
        self.v_proj = Projection(hidden, keys, bias=False)
        self.o_proj = Projection(queries, hidden, bias=False)
        self.q_norm = RmsNorm(width, config.rms_norm_eps)
        self.k_norm = RmsNorm(width, config.rms_norm_eps)

    def project(self, x_BTH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the normalised stream.

        Returns: q [B, T, N, D] and k [B, T, K, D] after their norms and before rotation; v [B, T, K, D].
        """
        heads = (*x_BTH.shape[:-1], -1, self.config.head_dim)
        q_BTND = self.q_norm(self.q_proj(x_BTH).view(heads))
        k_BTKD = self.k_norm(self.k_proj(x_BTH).view(heads))
        return q_BTND, k_BTKD, self.v_proj(x_BTH).view(heads)

    @staticmethod
    def rotate(x_BTND: Tensor, state: DonorState) -> Tensor:
        """Turn each head's pairs (i, i + D/2) by the angles of the token's position."""
        low, high = x_BTND.chunk(2, dim=-1)
        cos_BT1D, sin_BT1D = state.cos_BTD[:, :, None].to(x_BTND.dtype), state.sin_BTD[:, :, None].to(x_BTND.dtype)
        return x_BTND * cos_BT1D + torch.cat((-high, low), dim=-1) * sin_BT1D

    def attend(self, q_BTND: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, state: DonorState) -> Tensor:
        """Rotate, score by q.k / sqrt(D), mix the values.

        Args:    q_BTND, k_BTKD: as `project` returns them, not rotated.
        Returns: [B, T, N * D], heads in order: the input of `o_proj`.
        """
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        q_BNTD = self.rotate(q_BTND, state).transpose(1, 2)
        k_BNTD = self.rotate(k_BTKD, state).transpose(1, 2).repeat_interleave(group, dim=1)
        v_BNTD = v_BTKD.transpose(1, 2).repeat_interleave(group, dim=1)
        allowed = state.allowed_B1TT
        mixed_BNTD = F.scaled_dot_product_attention(
            q_BNTD, k_BNTD, v_BNTD, attn_mask=allowed, is_causal=allowed is None
        )
        return mixed_BNTD.transpose(1, 2).flatten(2)

    def forward(self, x_BTH: Tensor, state: DonorState) -> Tensor:
        """Attention's contribution to the stream, from the normalised stream."""
        return cast(Tensor, self.o_proj(self.attend(*self.project(x_BTH), state)))


class DonorMlp(nn.Module):
    """SiLU-gated feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DonorConfig) -> None:
        super().__init__()
        self.gate_proj = Projection(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Projection(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Projection(config.intermediate_size, config.hidden_size, bias=False)

    def gate(self, x_BTH: Tensor) -> Tensor:
        """The gate before its nonlinearity [B, T, F]."""
        return cast(Tensor, self.gate_proj(x_BTH))

    def up(self, x_BTH: Tensor) -> Tensor:
        """What the gate multiplies [B, T, F]."""
        return cast(Tensor, self.up_proj(x_BTH))

    def down(self, inner_BTF: Tensor) -> Tensor:
        """The way back to the stream [B, T, H]."""
        return cast(Tensor, self.down_proj(inner_BTF))

    def forward(self, x_BTH: Tensor) -> Tensor:
        """The feed-forward's contribution to the stream, from the normalised stream."""
        return self.down(F.silu(self.gate(x_BTH)) * self.up(x_BTH))


class DonorLayer(nn.Module):
    """One pre-norm block."""

    def __init__(self, config: DonorConfig) -> None:
        super().__init__()
        self.self_attn = DonorAttention(config)
        self.mlp = DonorMlp(config)
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BTH: Tensor, state: DonorState) -> Tensor:
        """The stream after attention and feed-forward."""
        x_BTH = x_BTH + self.self_attn(self.input_layernorm(x_BTH), state)
        return cast(Tensor, x_BTH + self.mlp(self.post_attention_layernorm(x_BTH)))


@cache
def compiled_layer() -> Callable[[DonorLayer, Tensor, DonorState], Tensor]:
    """`DonorLayer.forward`, compiled once for all layers."""
    return torch.compile(DonorLayer.forward, dynamic=False, fullgraph=True)


class DonorBody(nn.Module):
    """Everything below the head; exists so that names begin with `model.` as in stock checkpoints."""

    def __init__(self, config: DonorConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DonorLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)


class Donor(nn.Module):
    """Qwen3's dense language model; `donor.model.layers[i]` is 1-based layer i + 1."""

    def __init__(self, config: DonorConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DonorBody(config)
        self.recompute = False  # what a trainer may ask for; a donor is small
        if not config.tie_word_embeddings:
            self.lm_head = Projection(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix [V, H]; the embedding itself if the head is tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def layers(self) -> list[DonorLayer]:
        """The blocks in order."""
        return [cast(DonorLayer, layer) for layer in self.model.layers]

    def start(self, ids_BT: Tensor, documents_BT: Tensor | None = None) -> tuple[Tensor, DonorState]:
        """The stream before the first layer, and what the layers share.

        Args:    documents_BT: as in `forward_hidden`.
        Returns: x [B, T, H] and the state that every layer takes.
        """
        x_BTH = self.model.embed_tokens(ids_BT)
        one = torch.zeros_like(ids_BT) if documents_BT is None else documents_BT
        allowed = None if documents_BT is None else document_mask(documents_BT)
        return x_BTH, DonorState(*rotary_factors(positions_within(one), self.config, x_BTH.dtype), allowed)

    @property
    def max_sequence(self) -> int:
        """Tokens of the longest row that the model is made for."""
        return MAX_POSITIONS

    def can_be_fused(self, dtype: torch.dtype) -> bool:
        """Whether the layers have their fused form in a dtype: in any."""
        return True

    def kept_numbers(self, *, recompute: bool) -> int:
        """Numbers of the stream's size that a training pass keeps, a token; an upper estimate."""
        c = self.config
        heads = (2 * c.num_attention_heads + 4 * c.num_key_value_heads) * c.head_dim
        return c.num_hidden_layers * (8 * c.hidden_size + 4 * c.intermediate_size + 2 * heads)

    def hidden_of(self, ids_BT: Tensor, state: Stream, numerics: Numerics = REFERENCE) -> Tensor:
        """The stream after the final norm, for a trainer: the state says where documents are."""
        x_BTH = self.model.embed_tokens(ids_BT)
        x_BTH = x_BTH.to(numerics.dtype or x_BTH.dtype)
        allowed = None if state.run_BT is None else document_mask(state.run_BT)
        own = DonorState(*rotary_factors(state.positions_BT, self.config, x_BTH.dtype), allowed)
        step = compiled_layer() if numerics.is_fused else DonorLayer.forward
        for layer in self.layers:
            x_BTH = step(layer, x_BTH, own)
        return cast(Tensor, self.model.norm(x_BTH))

    def forward_hidden(self, ids_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """The stream after the final norm.

        Args:    documents_BT: integers, a document being a run of equal ones; None means one document a row.
        Returns: [B, T, H].
        """
        x_BTH, state = self.start(ids_BT, documents_BT)
        for layer in self.layers:
            x_BTH = layer(x_BTH, state)
        return cast(Tensor, self.model.norm(x_BTH))

    def forward(self, ids_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] in the dtype of the weights; documents_BT as in `forward_hidden`."""
        return F.linear(self.forward_hidden(ids_BT, documents_BT), self.head_weight)
