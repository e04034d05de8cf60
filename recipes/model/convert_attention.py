"""The donor's attention of 16 query and 8 key/value heads, fitted into the student's 8 and 2.

Place in the path: recipe -> **model**; one layer of `recipes.model.convert_walk`. `recipes.model.convert_heads` says
what each head should be; here the fused projection is fitted to that on the *student's* stream, then the gains of the
QK norms, then the softmax offsets are placed, and last o_proj with its bias is fitted to the donor's attention output
on the student's own patterns.

Invariants: every fit uses what is already rounded to its stored dtype, so errors of rounding are fitted away where they
can be; the layout is per key/value group; offsets are neutral, never 0.

Shapes: B batch, T tokens, N donor query heads, J donor key/value heads, S student query heads, G student key/value
heads, D head width, P = D / 2 rotary planes, H hidden.

Example:
    >>> tensors, figures = fit_attention(donor_layer, Streams(donor_rows, student_rows, drift=0.5), setting)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from recipes.model.attention import GroupedQueryAttention
from recipes.model.config import StudentConfig
from recipes.model.convert_heads import CANDIDATES, DonorRow, Merger, followed, look, merge_heads, wish
from recipes.model.donor import DonorLayer
from recipes.model.layerwise import Row, filled
from recipes.ops import heads as merging
from recipes.ops.linear import RidgeSums, token_weights

_NEUTRAL_GAP = 7.0  # a sink e^7 below the least mass that a query has takes less than a thousandth of it
_LEAST_MASS = 0.01  # the quantile of a head's log mass that counts as least
_STORED = torch.bfloat16


@dataclass(frozen=True)
class Setting:
    """The target, and the knobs of the fits."""

    config: StudentConfig
    number: int  # 1-based layer
    ridge: float
    value_residual: float
    token_limit: float  # energy of a token, in medians, above which it counts no more


@dataclass(frozen=True)
class Streams:
    """Both streams before the layer, on the same rows, and how much of their difference to make up for."""

    donor: Sequence[DonorRow]
    student: Sequence[Row]
    drift: float

    def targets(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """What the student should add to its stream where the donor adds `outputs`."""
        rows = zip(outputs, self.donor, self.student, strict=True)
        return [output + self.drift * (old.x_BTH - new.x_BTH) for output, old, new in rows]


@torch.no_grad()
def fit_attention(layer: DonorLayer, streams: Streams, setting: Setting) -> tuple[dict[str, Tensor], dict[str, float]]:
    """All attention tensors of one student layer, by their names below `self_attn.`, in their stored dtypes.

    Returns: the tensors, and figures on how much the merging lost.
    """
    seen = look(layer, streams.donor)
    merger = merge_heads(layer, seen)
    merger = replace(merger, follows=followed(layer, merger, streams.donor[: max(1, len(streams.donor) // 4)]))
    tensors = _fit_projection(layer, merger, streams, setting)
    tensors.update(_fit_gains(layer, merger, streams, _attention(tensors, setting)))
    tensors["softmax_offset"] = neutral_offsets(tensors, layer, streams.student, setting)
    tensors.update(_fit_output(tensors, layer, streams.student, streams.targets(seen.outputs), setting))
    figures = {
        "value_energy_lost": math.fsum(merged.lost for merged in merger.values) / len(merger.values),
        "key_energy_lost": math.fsum(merged.lost for merged in merger.keys) / len(merger.keys),
        "heads_merged_by_mean": float(sum(choice == CANDIDATES - 1 for choice in merger.follows)),
    }
    return tensors, figures


def pool_attention(layer: DonorLayer, student: Sequence[Row], setting: Setting) -> dict[str, Tensor]:
    """The baseline: neighbouring heads averaged, their output columns added, neutral offsets, the right layout."""
    attention, config = layer.self_attn, setting.config
    q_SDH = merging.mean_heads(
        attention.q_proj.weight, heads=attention.config.num_attention_heads, keep=config.num_query_heads
    )
    old = attention.config.num_key_value_heads
    k_GDH = merging.mean_heads(attention.k_proj.weight, heads=old, keep=config.num_kv_heads)
    v_GDH = merging.mean_heads(attention.v_proj.weight, heads=old, keep=config.num_kv_heads)
    output = merging.sum_output_heads(
        attention.o_proj.weight, heads=attention.config.num_attention_heads, keep=config.num_query_heads
    )
    tensors = {
        "qkv_proj.weight": merging.fuse_qkv(q_SDH, k_GDH, v_GDH).to(_STORED),
        "qkv_proj.bias": output.new_zeros(config.qkv_rows, dtype=_STORED),
        "q_norm.weight": attention.q_norm.weight.to(_STORED),
        "k_norm.weight": attention.k_norm.weight.to(_STORED),
        "o_proj.weight": output.to(_STORED),
        "o_proj.bias": output.new_zeros(config.hidden_size, dtype=_STORED),
        **_value_residual(setting, output.device),
    }
    tensors["softmax_offset"] = neutral_offsets(tensors, layer, student, setting)
    return tensors


def _fit_projection(layer: DonorLayer, merger: Merger, streams: Streams, setting: Setting) -> dict[str, Tensor]:
    device = layer.input_layernorm.weight.device
    sums = RidgeSums(setting.config.hidden_size, setting.config.qkv_rows, device=device)
    for old, new in zip(streams.donor, streams.student, strict=True):
        wished = wish(layer, merger, layer.input_layernorm(old.x_BTH).flatten(0, 1))
        sums.add(layer.input_layernorm(new.x_BTH).flatten(0, 1), wished.raw_TO)
    weight, bias = sums.solve(ridge=setting.ridge)
    return {
        "qkv_proj.weight": weight.to(_STORED),
        "qkv_proj.bias": bias.to(_STORED),
        **_value_residual(setting, device),
    }


def _value_residual(setting: Setting, device: torch.device) -> dict[str, Tensor]:
    return {"value_residual": torch.tensor(setting.value_residual, device=device)} if setting.number > 1 else {}


def _fit_gains(
    layer: DonorLayer, merger: Merger, streams: Streams, attention: GroupedQueryAttention
) -> dict[str, Tensor]:
    """Gains with which the normalised projections come closest to the wished queries and keys."""
    config = attention.config
    weight = layer.input_layernorm.weight
    gained = {name: weight.new_zeros(2, config.head_dim, dtype=torch.float64) for name in ("q_norm", "k_norm")}
    for old, new in zip(streams.donor, streams.student, strict=True):
        wished = wish(layer, merger, layer.input_layernorm(old.x_BTH).flatten(0, 1))
        q_BTSD, k_BTGD, _ = attention.project(layer.input_layernorm(new.x_BTH))
        for name, unit, wanted in (("q_norm", q_BTSD, wished.q_TSD), ("k_norm", k_BTGD, wished.k_TGD)):
            unit_TXD = unit.flatten(0, 1).double()
            gained[name] += torch.stack([(unit_TXD * wanted).sum((0, 1)), unit_TXD.square().sum((0, 1))])
    return {f"{name}.weight": (s[0] / s[1].clamp(min=1e-12)).to(_STORED) for name, s in gained.items()}


@torch.no_grad()
def neutral_offsets(
    tensors: Mapping[str, Tensor], layer: DonorLayer, student: Sequence[Row], setting: Setting
) -> Tensor:
    """Offsets far below every head's mass, so that they take none, but near enough for a gradient; float32 [S]."""
    attention = _attention(tensors, setting)
    mass: list[Tensor] = []
    for x_BTH, state in student:
        q, k, _ = attention.project(layer.input_layernorm(x_BTH))
        mass.append(attention.log_sum_exp(q, k, state).flatten(0, 1))
        state.shared.clear()
    sorted_TS = torch.cat(mass).float().sort(dim=0).values
    return sorted_TS[int(_LEAST_MASS * (len(sorted_TS) - 1))] - _NEUTRAL_GAP


def _fit_output(
    tensors: Mapping[str, Tensor],
    layer: DonorLayer,
    student: Sequence[Row],
    targets: Sequence[Tensor],
    setting: Setting,
) -> dict[str, Tensor]:
    """Output projection and bias on the student's own patterns and values."""
    attention, config = _attention(tensors, setting), setting.config
    sums = RidgeSums(config.num_query_heads * config.head_dim, config.hidden_size, device=targets[0].device)
    for (x_BTH, state), target_BTH in zip(student, targets, strict=True):
        mixed = attention.attend(*attention.project(layer.input_layernorm(x_BTH)), state)
        state.shared.clear()
        y_TH = target_BTH.flatten(0, 1)
        sums.add(mixed.flatten(0, 1), y_TH, token_weights(y_TH, limit=setting.token_limit))
    weight, bias = sums.solve(ridge=setting.ridge)
    return {"o_proj.weight": weight.to(_STORED), "o_proj.bias": bias.to(_STORED)}


def _attention(tensors: Mapping[str, Tensor], setting: Setting) -> GroupedQueryAttention:
    """The student's attention with what is fitted so far; what is not yet has no effect on what is asked of it."""
    config = setting.config
    with torch.device("meta"):
        attention = GroupedQueryAttention(config, number=setting.number)
    weight = tensors["qkv_proj.weight"]
    open_ones = {
        "o_proj.weight": weight.new_zeros(config.hidden_size, config.num_query_heads * config.head_dim),
        "o_proj.bias": weight.new_zeros(config.hidden_size),
        "softmax_offset": weight.new_zeros(config.num_query_heads),
        "q_norm.weight": weight.new_ones(config.head_dim),
        "k_norm.weight": weight.new_ones(config.head_dim),
    }
    return filled(
        attention, {**open_ones, **tensors}, dtype=torch.float32, where=f"attention of layer {setting.number}"
    )
