"""Shapes of the donor and of the student, as typed values; torch-free.

Place in the path: config -> recipe. Part of every checkpoint recipe's code closure, because what is derived here
(roles of layers, slopes, group sizes) decides bytes.

Layer numbers are 1-based, as in the runbook: layer l is global if l % global_every == 0.

Example:
    >>> StudentConfig(hidden_size=64, num_layers=4, ffn_hidden_size=32, attention="tpa").is_global(4)
    True
"""

from __future__ import annotations

from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PADDED_VOCAB: Final = 201088
HEAD_DIM: Final = 128
WINDOW: Final = 128
GLOBAL_EVERY: Final = 4
NUM_QUERY_HEADS: Final = 8
NUM_KV_HEADS: Final = 2


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class DonorConfig(_Value):
    """Qwen3 dense architecture (Hugging Face `Qwen3Config` names where they exist)."""

    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = HEAD_DIM
    vocab_size: int = 151936
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True


class MoeConfig(_Value):
    """Mixture of experts of layers 2 and up: sigmoid router, groups, one shared expert, top-k."""

    num_experts: int = Field(256, gt=0)
    expert_hidden_size: int = Field(128, gt=0)
    shared_hidden_size: int = Field(512, gt=0)
    top_k: int = 4
    num_groups: int = 8
    top_groups: int = 4
    routed_scaling: float = 2.5
    bias_update_rate: float = 1e-3
    balance_loss_weight: float = 1e-4

    @model_validator(mode="after")
    def _groups(self) -> MoeConfig:
        if self.num_experts % self.num_groups or self.top_k > self.num_experts:
            raise ValueError(
                f"{self.num_experts} experts do not divide into {self.num_groups} groups with top {self.top_k}"
            )
        if self.top_groups > self.num_groups or self.top_k % self.top_groups:
            raise ValueError("top_k must be a multiple of top_groups, and top_groups at most num_groups")
        return self


class StudentConfig(_Value):
    """The vp architecture. `gqa` is compat mode (causal GQA, RoPE), `tpa` real mode (local TPA, global GQA).

    Raises:  ValidationError: a value out of range, or in real mode a number of layers that the 3:1 schedule does not
             divide.
    """

    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    ffn_hidden_size: int = Field(gt=0)
    attention: Literal["gqa", "tpa"]
    num_query_heads: Literal[8] = NUM_QUERY_HEADS
    num_kv_heads: Literal[2] = NUM_KV_HEADS
    head_dim: Literal[128] = HEAD_DIM
    vocab_size: Literal[201088] = PADDED_VOCAB
    window: Literal[128] = WINDOW
    global_every: Literal[4] = GLOBAL_EVERY
    rope_base: float = 1e6
    norm_eps: float = 1e-6
    query_rank: int = 4
    kv_rank: int = 2
    max_sequence: int = 2048
    moe: MoeConfig | None = None

    @model_validator(mode="after")
    def _schedule(self) -> StudentConfig:
        if self.attention == "tpa" and self.num_layers % self.global_every:
            raise ValueError(f"{self.num_layers} layers break the 3:1 schedule: give a multiple of {self.global_every}")
        return self

    def is_global(self, layer: int) -> bool:
        """Whether 1-based `layer` attends without a window (real mode)."""
        return layer % self.global_every == 0

    def uses_tpa(self, layer: int) -> bool:
        """Whether 1-based `layer` builds q, k, v from TPA factors."""
        return self.attention == "tpa" and not self.is_global(layer)

    def uses_rotary(self, layer: int) -> bool:
        """Whether 1-based `layer` rotates queries and keys; real mode's global layers do not."""
        return self.attention == "gqa" or not self.is_global(layer)

    def uses_alibi(self, layer: int) -> bool:
        """Whether 1-based `layer` biases its scores by distance: real mode's global layers."""
        return not self.uses_rotary(layer)

    def layer_window(self, layer: int) -> int | None:
        """Tokens that 1-based `layer` sees, the current one included; None if it sees all before it."""
        return self.window if self.uses_tpa(layer) else None

    def is_moe(self, layer: int) -> bool:
        """Whether 1-based `layer` routes; the first layer stays dense."""
        return self.moe is not None and layer > 1

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused projection: (queries + keys + values) x head_dim."""
        return (self.num_query_heads + 2 * self.num_kv_heads) * self.head_dim
