"""What Megatron computes from a checkpoint, in plain torch: the other side of the numeric check.

Place in the path: layout -> **megatron** -> check. It reads Megatron's keys by Megatron's conventions and shares no
code with recipes.model: what a strict loader cannot see, a wrong order of q, k and v, changes its logits.

Invariants: float32 throughout; one layer's weights are in memory at a time; one document, no dropout.

Shapes, Megatron's: s tokens, h hidden, n query heads, g key/value heads, d head dimension, r rank, E experts.

Example:
    >>> hidden_sh = hidden_states(folder.read, config, ids)

Source: SelfAttention.get_query_key_value_tensors, TopKRouter and MLP of Megatron-Core 0.16.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from recipes.model.config import MoeConfig, StudentConfig

Read = Callable[[str], Tensor]  # Megatron's key -> tensor


def hidden_states(read: Read, config: StudentConfig, ids_s: Tensor) -> Tensor:
    """Hidden states after the final norm, [s, h]."""
    x_sh = read("embedding.word_embeddings.weight")[ids_s].float()
    frequency = _frequencies(read, config)
    first_values = None
    for number in range(1, config.num_layers + 1):
        layer = _Layer(read, config, number)
        mixed, first_values = layer.attention(x_sh, frequency, first_values)
        x_sh = x_sh + mixed
        x_sh = x_sh + layer.feed_forward(x_sh)
    return _normed(x_sh, read("decoder.final_layernorm.weight"), config)


def logits(read: Read, hidden_sh: Tensor, *, chunk: int = 1 << 14) -> Tensor:
    """Logits of the whole vocabulary, [s, V]; the head is cast `chunk` rows at a time."""
    return torch.cat([hidden_sh @ rows.float().T for rows in torch.split(read("output_layer.weight"), chunk)], dim=-1)


def _frequencies(read: Read, config: StudentConfig) -> Tensor:
    if config.attention == "tpa":
        return torch.exp(read("rotary_pos_emb.log_freq").float() / 16)
    even = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    return torch.pow(torch.tensor(config.rope_base), even / config.head_dim).reciprocal()


def _normed(x: Tensor, gain: Tensor, config: StudentConfig) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps) * gain.float()


def _rotated(x_snd: Tensor, frequency: Tensor) -> Tensor:
    """Rotate by halves; positions are indices of the row."""
    angle = torch.outer(torch.arange(x_snd.shape[0], dtype=torch.float32), frequency).repeat(1, 2)[:, None]
    first, second = x_snd.chunk(2, dim=-1)
    return x_snd * angle.cos() + torch.cat((-second, first), dim=-1) * angle.sin()


class _Layer:
    """One block, read from Megatron's keys when they are needed."""

    def __init__(self, read: Read, config: StudentConfig, number: int) -> None:
        self._read, self.config, self.number = read, config, number

    def weight(self, key: str) -> Tensor:
        """A tensor of this layer in float32."""
        return self._read(f"decoder.layers.{self.number - 1}.{key}").float()

    def linear(self, x: Tensor, key: str) -> Tensor:
        """W x + b."""
        return x @ self.weight(f"{key}.weight").T + self.weight(f"{key}.bias")

    def attention(self, x_sh: Tensor, frequency: Tensor, first_values: Tensor | None) -> tuple[Tensor, Tensor]:
        """What attention adds to the stream, and layer 1's values."""
        config, at = self.config, "self_attention."
        tokens, groups = x_sh.shape[0], config.num_kv_heads
        mixed = self._mixed_qkv(_normed(x_sh, self.weight(f"{at}linear_qkv.layer_norm_weight"), config))
        per_group = config.num_query_heads // groups * config.head_dim
        sizes = [per_group, config.head_dim, config.head_dim]
        q, k, v = torch.split(mixed.view(tokens, groups, -1), sizes, dim=-1)
        q = _normed(q.reshape(tokens, -1, config.head_dim), self.weight(f"{at}q_layernorm.weight"), config)
        k = _normed(k, self.weight(f"{at}k_layernorm.weight"), config)
        if first_values is None:
            first_values = v
        else:
            share = torch.sigmoid(self.weight(f"{at}value_residual_logit"))
            v = share * v + (1 - share) * first_values
        if config.uses_rotary(self.number):
            q, k = _rotated(q, frequency), _rotated(k, frequency)
        return self.linear(self._attended(q, k, v), f"{at}linear_proj"), first_values

    def _mixed_qkv(self, x_sh: Tensor) -> Tensor:
        config, qkv = self.config, "self_attention.linear_qkv"
        if not config.uses_tpa(self.number):
            return self.linear(x_sh, qkv)
        parts = []
        for name, rank in (("q", config.query_rank), ("k", config.kv_rank), ("v", config.kv_rank)):
            a = torch.unflatten(x_sh @ self.weight(f"{qkv}.linear_a_{name}.weight").T, -1, (-1, rank))
            b = torch.unflatten(x_sh @ self.weight(f"{qkv}.linear_b_{name}.weight").T, -1, (rank, -1))
            parts.append(torch.unflatten(a @ b / rank, 1, (config.num_kv_heads, -1)))
        return torch.cat(parts, dim=2).flatten(1) + self.weight(f"{qkv}.bias")

    def _attended(self, q_snd: Tensor, k_sgd: Tensor, v_sgd: Tensor) -> Tensor:
        """Softmax with an offset in the denominator, [s, n * d]."""
        config, tokens = self.config, q_snd.shape[0]
        heads = config.num_query_heads
        repeats = heads // config.num_kv_heads
        k_snd, v_snd = k_sgd.repeat_interleave(repeats, dim=1), v_sgd.repeat_interleave(repeats, dim=1)
        scores = torch.einsum("snd,tnd->nst", q_snd, k_snd) / math.sqrt(config.head_dim)
        distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
        if config.uses_alibi(self.number):
            slope = torch.tensor([0.5**head for head in range(1, heads + 1)])
            scores = scores - slope[:, None, None] * distance
        window = config.layer_window(self.number) or tokens
        scores = scores.masked_fill((distance < 0) | (distance >= window), float("-inf"))
        offset = self.weight("self_attention.core_attention.softmax_offset")[:, None, None].expand(-1, tokens, 1)
        mass = torch.softmax(torch.cat((scores, offset), dim=-1), dim=-1)[..., :-1]
        return torch.einsum("nst,tnd->snd", mass, v_snd).flatten(1)

    def feed_forward(self, x_sh: Tensor) -> Tensor:
        """What the dense block, or the experts and the shared expert, add to the stream."""
        x_sh = _normed(x_sh, self.weight("mlp.linear_fc1.layer_norm_weight"), self.config)
        if self.config.moe is None or not self.config.is_moe(self.number):
            return self._dense(x_sh, "mlp")
        return self._dense(x_sh, "mlp.shared_experts") + self._routed(x_sh, self.config.moe)

    def _dense(self, x_sh: Tensor, key: str) -> Tensor:
        inner = torch.relu(self.linear(x_sh, f"{key}.linear_fc1")).square()
        return self.linear(inner, f"{key}.linear_fc2")

    def _routed(self, x_sh: Tensor, moe: MoeConfig) -> Tensor:
        """Each token's experts, weighted by their gates."""
        score_sE = torch.sigmoid(self.linear(x_sh, "mlp.router"))
        choice_sE = score_sE + self.weight("mlp.router.expert_bias")
        grouped = torch.unflatten(choice_sE, -1, (moe.num_groups, -1))
        kept = grouped.topk(moe.top_k // moe.top_groups, dim=-1).values.sum(-1).topk(moe.top_groups, dim=-1).indices
        is_kept = torch.zeros_like(grouped[..., 0]).scatter(-1, kept, 1.0).bool()
        choice_sE = grouped.masked_fill(~is_kept[..., None], float("-inf")).flatten(-2)
        expert_sk = choice_sE.topk(moe.top_k, dim=-1).indices
        gate_sk = score_sE.gather(-1, expert_sk)
        gate_sk = moe.routed_scaling * gate_sk / gate_sk.sum(-1, keepdim=True)
        stacks = [self._read_stack(fc, part) for fc in ("fc1", "fc2") for part in ("weight", "bias")]
        out_sh = torch.zeros_like(x_sh)
        for expert in torch.unique(expert_sk).tolist():
            w1, b1, w2, b2 = (stack[expert].float() for stack in stacks)
            rows, places = (expert_sk == expert).nonzero(as_tuple=True)
            inner = torch.relu(x_sh[rows] @ w1.T + b1).square()
            out_sh[rows] += gate_sk[rows, places, None] * (inner @ w2.T + b2)
        return out_sh

    def _read_stack(self, fc: str, part: str) -> Tensor:
        """All experts, in their stored dtype."""
        return self._read(f"decoder.layers.{self.number - 1}.mlp.experts.experts.linear_{fc}.{part}")
