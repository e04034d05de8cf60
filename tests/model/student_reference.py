"""The student written out from the formulas: one token, one head, one key at a time, in float64.

It shares no code with recipes.model but the config; weights are a state_dict turned into numpy arrays.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Weights = dict[str, Array]


def numpy_weights(state_dict: dict[str, Any]) -> Weights:
    return {name: tensor.detach().double().cpu().numpy() for name, tensor in state_dict.items()}


def below(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def rms(x: Array, gain: Array, eps: float) -> Array:
    return gain * x / math.sqrt(sum(value * value for value in x) / len(x) + eps)


def rotated(x: Array, position: int, frequency: Array) -> Array:
    half = len(x) // 2
    out = np.zeros_like(x)
    for i in range(half):
        cos, sin = math.cos(position * frequency[i]), math.sin(position * frequency[i])
        out[i] = x[i] * cos - x[i + half] * sin
        out[i + half] = x[i + half] * cos + x[i] * sin
    return out


def factors(weights: Weights, letter: str, x: Array, heads: int, rank: int) -> list[Array]:
    """Heads of TPA's q, k or v: (1/R) sum_r A[h, r] B[r]."""
    a, b = weights[f"a_{letter}.weight"] @ x, weights[f"b_{letter}.weight"] @ x
    width = len(b) // rank
    return [
        sum((a[h * rank + r] * b[r * width : (r + 1) * width] for r in range(rank)), np.zeros(width)) / rank
        for h in range(heads)
    ]


def projected(weights: Weights, x: Array, config: Any) -> tuple[list[Array], list[Array], list[Array]]:
    """q, k, v heads of one token before QK-norm; row r of group c starts at (6 c + r) * 128."""
    width, per_group = config.head_dim, config.num_query_heads // config.num_kv_heads + 2
    bias = weights["qkv_bias" if "qkv_bias" in weights else "qkv_proj.bias"]

    def place(group: int, slot: int) -> slice:
        return slice((group * per_group + slot) * width, (group * per_group + slot + 1) * width)

    q_places = [place(h // (per_group - 2), h % (per_group - 2)) for h in range(config.num_query_heads)]
    k_places = [place(c, per_group - 2) for c in range(config.num_kv_heads)]
    v_places = [place(c, per_group - 1) for c in range(config.num_kv_heads)]
    if "a_q.weight" not in weights:
        w = weights["qkv_proj.weight"]
        q, k, v = ([w[p] @ x + bias[p] for p in places] for places in (q_places, k_places, v_places))
        return q, k, v
    q = factors(weights, "q", x, config.num_query_heads, config.query_rank)
    k = factors(weights, "k", x, config.num_kv_heads, config.kv_rank)
    v = factors(weights, "v", x, config.num_kv_heads, config.kv_rank)
    return (
        [head + bias[p] for head, p in zip(q, q_places, strict=True)],
        [head + bias[p] for head, p in zip(k, k_places, strict=True)],
        [head + bias[p] for head, p in zip(v, v_places, strict=True)],
    )


def frequencies(config: Any, log_freq: Array | None) -> Array:
    if log_freq is not None:
        return np.array([math.exp(p / 16) for p in log_freq])
    return np.array([config.rope_base ** (-2 * i / config.head_dim) for i in range(config.head_dim // 2)])


class ReferenceAttention:
    """Attention of one layer over one document. window=None sees all; rotary and alibi as given."""

    def __init__(self, config: Any, number: int, *, log_freq: Array | None = None, window: int | None = None) -> None:
        real = config.attention == "tpa"
        local = real and number % 4 != 0
        self.config, self.number = config, number
        self.window = window if window is not None else (128 if local else None)
        self.rotary = local or not real
        self.alibi = real and not local
        self.frequency = frequencies(config, log_freq) if self.rotary else None

    def __call__(self, weights: Weights, x: Array, v1: Array | None) -> tuple[Array, Array]:
        """(concatenated heads of each token, this layer's own values)."""
        config, tokens = self.config, len(x)
        q_all, k_all, v_all = [], [], []
        for position, token in enumerate(x):
            q, k, v = projected(weights, token, config)
            q = [rms(head, weights["q_norm.weight"], config.norm_eps) for head in q]
            k = [rms(head, weights["k_norm.weight"], config.norm_eps) for head in k]
            if self.frequency is not None:
                q = [rotated(head, position, self.frequency) for head in q]
                k = [rotated(head, position, self.frequency) for head in k]
            q_all.append(q), k_all.append(k), v_all.append(v)
        values = np.array(v_all)
        mixed_values = values
        if self.number > 1:
            share = 1 / (1 + math.exp(-float(weights["value_residual"])))
            mixed_values = share * values + (1 - share) * v1
        out = np.zeros((tokens, config.num_query_heads * config.head_dim))
        for i in range(tokens):
            for h in range(config.num_query_heads):
                out[i, h * config.head_dim : (h + 1) * config.head_dim] = self._mix(
                    i, h, q_all[i][h], k_all, mixed_values, float(weights["softmax_offset"][h])
                )
        return out, values

    def _mix(self, i: int, h: int, q: Array, k_all: list[list[Array]], values: Array, offset: float) -> Array:
        group = h // (self.config.num_query_heads // self.config.num_kv_heads)
        first = 0 if self.window is None else max(0, i - (self.window - 1))
        total, mixed = math.exp(offset), np.zeros(self.config.head_dim)
        for j in range(first, i + 1):
            score = float(q @ k_all[j][group]) / math.sqrt(self.config.head_dim)
            if self.alibi:
                score -= 2.0 ** -(h + 1) * (i - j)
            total += math.exp(score)
            mixed = mixed + math.exp(score) * values[j, group]
        return mixed / total


def feed_forward(weights: Weights, x: Array) -> Array:
    inner = weights["fc1.weight"] @ x + weights["fc1.bias"]
    return weights["fc2.weight"] @ np.array([max(u, 0.0) ** 2 for u in inner]) + weights["fc2.bias"]


def chosen_experts(biased: Array, moe: Any) -> list[int]:
    """Groups by the sum of their top_k / top_groups best, then the best experts inside; lowest index among equals."""
    size, best_of = moe.num_experts // moe.num_groups, moe.top_k // moe.top_groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(moe.num_groups)]
    group_scores = [sum(sorted((biased[e] for e in group), reverse=True)[:best_of]) for group in members]
    kept = sorted(range(moe.num_groups), key=lambda g: (-group_scores[g], g))[: moe.top_groups]
    candidates = [e for g in kept for e in members[g]]
    return sorted(candidates, key=lambda e: (-biased[e], e))[: moe.top_k]


def scores_of(weights: Weights, x: Array) -> Array:
    logits = weights["router.weight"] @ x + weights["router.bias"]
    return np.array([1 / (1 + math.exp(-z)) for z in logits])


def mixture(weights: Weights, x: Array, moe: Any) -> Array:
    scores = scores_of(weights, x)
    chosen = chosen_experts(scores + weights["router.expert_bias"], moe)
    out = feed_forward(below(weights, "shared_expert."), x)
    for e in chosen:
        gate = moe.routed_scaling * scores[e] / sum(scores[c] for c in chosen)
        inner = weights["experts.fc1_weight"][e] @ x + weights["experts.fc1_bias"][e]
        out = out + gate * (
            weights["experts.fc2_weight"][e] @ np.maximum(inner, 0) ** 2 + weights["experts.fc2_bias"][e]
        )
    return out


def logits_of(weights: Weights, ids: list[int], config: Any) -> Array:
    """Logits [T, V] of one document."""
    x = weights["model.embed_tokens.weight"][ids]
    log_freq, v1 = weights.get("model.grape.log_freq"), None
    for index in range(config.num_layers):
        layer = below(weights, f"model.layers.{index}.")
        attention, mlp = below(layer, "self_attn."), below(layer, "mlp.")
        normed = np.array([rms(token, layer["input_layernorm.weight"], config.norm_eps) for token in x])
        mixed, values = ReferenceAttention(config, index + 1, log_freq=log_freq)(attention, normed, v1)
        v1 = values if index == 0 else v1
        x = x + mixed @ attention["o_proj.weight"].T + attention["o_proj.bias"]
        normed = [rms(token, layer["post_attention_layernorm.weight"], config.norm_eps) for token in x]
        is_moe = config.moe is not None and index > 0
        x = x + np.array([mixture(mlp, t, config.moe) if is_moe else feed_forward(mlp, t) for t in normed])
    x = np.array([rms(token, weights["model.norm.weight"], config.norm_eps) for token in x])
    return x @ weights["lm_head.weight"].T
