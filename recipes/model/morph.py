"""One attention layer rebuilt in its other form: full GQA with rotation -> windowed TPA, or -> ALiBi without rotation.

Place in the path: recipe -> **model**; morph_real walks the layers and calls this. Everything is fitted on the inputs
that the layer will really get, which come from the layers already rebuilt.

Invariants: results are in the dtypes of the checkpoint, and what is fitted later is fitted to the rounded values of
what was fitted before; norms and feed-forward are not touched.

Shapes: B batch, T tokens (all rows together), H hidden, Q query heads, K KV heads, d head dimension, C = Q * d.

Example:
    >>> tensors = morph_local(old, config, streams, targets, fit=fit)
    >>> new = layer_of({**rest, **tensors}, config, number=1)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.model.config import StudentConfig
from recipes.model.grape import rope_frequencies, rotate
from recipes.model.layerwise import Row, layer_of
from recipes.model.stream import Stream, visible_keys
from recipes.model.transformer import Layer
from recipes.ops.alibi import (
    mean_distance,
    offset_mass,
    order_by_distance,
    permute_output,
    permute_qkv,
    plane_gains,
    split_gains,
)
from recipes.ops.linear import RidgeSums
from recipes.ops.sink import kept_mass, match_kept_mass
from recipes.ops.tpa import (
    Factors,
    constant_direction,
    constant_factors,
    direction_weights,
    fitted_factors,
    low_rank_factors,
    stored,
    sweep,
)

OUTPUT = ("self_attn.o_proj.weight", "self_attn.o_proj.bias")
OFFSET = "self_attn.softmax_offset"


@dataclass(frozen=True)
class Fit:
    """Knobs of the fits."""

    ridge: float  # relative to the mean diagonal of each system
    query_sweeps: int  # rounds of alternating least squares after the closed form
    plane_floor: float  # smallest magnitude of a rotary plane's gain


@dataclass(frozen=True)
class RawHeads:
    """Heads before their norms, all tokens together: [T, heads, d]."""

    q: Tensor
    k: Tensor
    v: Tensor


def raw_heads(layer: Layer, streams: Sequence[Row]) -> RawHeads:
    """Queries, keys and values of a layer, with their biases and before QK-norm."""
    config = layer.self_attn.config
    groups, size = config.num_kv_heads, config.num_query_heads // config.num_kv_heads
    with torch.no_grad():
        rows = [layer.self_attn.raw_qkv(layer.input_layernorm(x)).flatten(0, 1) for x, _ in streams]
    fused = torch.cat(rows).reshape(-1, groups, size + 2, config.head_dim)
    return RawHeads(fused[:, :, :size].flatten(1, 2), fused[:, :, size], fused[:, :, size + 1])


def morph_local(
    old: Layer, config: StudentConfig, streams: Sequence[Row], targets: Sequence[Tensor], *, fit: Fit
) -> dict[str, Tensor]:
    """Tensor product factors, a window, and an offset that takes the mass of the keys behind the window.

    Args:    old: the full-attention layer; config: real mode; streams: inputs of the new layer;
             targets: for each stream what the attention should add to it.
    Returns: all tensors of the new attention, named without their layer prefix.
    """
    tensors = _attention_tensors(old)
    weight, bias = tensors.pop("self_attn.qkv_proj.weight"), tensors.pop("self_attn.qkv_proj.bias")
    tensors.update(_factors(old, (weight, bias), streams, fit=fit))
    new = _assembled(old, config, tensors)
    tensors[OFFSET] = _matched_offset(old, new, streams, before_Q=old.self_attn.softmax_offset)
    new = _assembled(old, config, tensors)
    return {**tensors, **refit_output(new, streams, targets, fit=fit)}


def _factors(old: Layer, fused: tuple[Tensor, Tensor], streams: Sequence[Row], *, fit: Fit) -> dict[str, Tensor]:
    config = old.self_attn.config
    groups, size = config.num_kv_heads, config.num_query_heads // config.num_kv_heads
    weight, bias = (part.double().reshape(groups, size + 2, config.head_dim, *part.shape[1:]) for part in fused)
    x_TH = _inputs(old, streams)
    heads = raw_heads(old, streams)
    w_H = constant_direction(x_TH, ridge=fit.ridge)
    keys = constant_factors(w_H, weight[:, size], bias[:, size])
    values = fitted_factors(w_H, x_TH, heads.v, start_NdD=weight[:, size + 1], ridge=fit.ridge)
    queries = low_rank_factors(
        w_H, x_TH, heads.q, start_NdD=weight[:, :size].flatten(0, 1), rank=config.query_rank, ridge=fit.ridge
    )
    weights = direction_weights(heads.q)
    for _ in range(fit.query_sweeps):
        queries = sweep(queries, x_TH, heads.q, weights, ridge=fit.ridge)
    return _named_factors({"q": queries, "k": keys, "v": values}, groups=groups)


def _named_factors(factors: Mapping[str, Factors], *, groups: int) -> dict[str, Tensor]:
    named, biases = {}, []
    for kind in ("q", "k", "v"):
        a, b, bias = stored(factors[kind])
        named[f"self_attn.a_{kind}.weight"] = a.bfloat16()
        named[f"self_attn.b_{kind}.weight"] = b.bfloat16()
        biases.append(bias.reshape(groups, -1))
    named["self_attn.qkv_bias"] = torch.cat(biases, dim=1).flatten().bfloat16()
    return named


def morph_global(
    old: Layer, config: StudentConfig, streams: Sequence[Row], targets: Sequence[Tensor], *, fit: Fit
) -> dict[str, Tensor]:
    """No rotation, linear distance biases: planes damped to their mean rotation, short-sighted heads on steep slopes.

    Args:    as for `morph_local`.
    Returns: all tensors of the new attention, named without their layer prefix.
    """
    groups, width = config.num_kv_heads, config.head_dim
    mass_QO = _offset_masses(old, streams)
    order = order_by_distance(mean_distance(mass_QO), groups=groups)
    frequency = rope_frequencies(width, base=config.rope_base).to(mass_QO.device)
    q_gain, k_gain = split_gains(plane_gains(mass_QO.sum(dim=0), frequency), floor=fit.plane_floor)
    tensors = _attention_tensors(old)
    for name in ("self_attn.qkv_proj.weight", "self_attn.qkv_proj.bias"):
        tensors[name] = permute_qkv(tensors[name], order, groups=groups, head_dim=width)
    tensors[OUTPUT[0]] = permute_output(tensors[OUTPUT[0]], order, head_dim=width)
    for name, gain in (("self_attn.q_norm.weight", q_gain), ("self_attn.k_norm.weight", k_gain)):
        tensors[name] = (tensors[name].double() * gain).bfloat16()
    before_Q = old.self_attn.softmax_offset[list(order)]
    tensors[OFFSET] = before_Q
    new = _assembled(old, config, tensors)
    tensors[OFFSET] = _matched_offset(old, new, streams, before_Q=before_Q, order=order)
    new = _assembled(old, config, tensors)
    return {**tensors, **refit_output(new, streams, targets, fit=fit)}


@torch.no_grad()
def _offset_masses(layer: Layer, streams: Sequence[Row]) -> Tensor:
    """Attention mass by head and distance, float64 [Q, O]."""
    longest = max(x.shape[1] for x, _ in streams)
    sink_Q = layer.self_attn.softmax_offset
    total = torch.zeros((len(sink_Q), longest), dtype=torch.float64, device=sink_Q.device)
    for x_BTH, state in streams:
        tokens = x_BTH.shape[1]
        index = torch.arange(tokens, device=total.device)
        offset_BTT = (index[:, None] - index).expand(x_BTH.shape[0], -1, -1)
        total[:, :tokens] += offset_mass(attention_pattern(layer, x_BTH, state), offset_BTT, offsets=tokens)
    return total


@torch.no_grad()
def attention_pattern(layer: Layer, x_BTH: Tensor, state: Stream) -> Tensor:
    """Softmax probabilities [B, Q, T, T] of a layer with rotation and no window; the offset's share is left out."""
    attention = layer.self_attn
    q, k, _ = attention.project(layer.input_layernorm(x_BTH))
    if state.rotary is not None:
        q, k = rotate(q, state.rotary), rotate(k, state.rotary)
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bind,bjnd->bnij", q, k) / q.shape[-1] ** 0.5
    index = torch.arange(x_BTH.shape[1], device=x_BTH.device)
    visible = visible_keys(index, index, window=None)[None]
    if state.run_BT is not None:
        visible = visible & (state.run_BT[:, :, None] == state.run_BT[:, None, :])
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    sink = attention.softmax_offset[None, :, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]


@torch.no_grad()
def _matched_offset(
    old: Layer, new: Layer, streams: Sequence[Row], *, before_Q: Tensor, order: Sequence[int] | None = None
) -> Tensor:
    """Offsets with which the new layer keeps as much mass as the old one kept on the keys that both see."""
    old_all, old_seen, new_seen = [], [], []
    for x_BTH, state in streams:
        x = old.input_layernorm(x_BTH)
        q, k, _ = old.self_attn.project(x)
        old_all.append(old.self_attn.log_sum_exp(q, k, state).flatten(0, 1))
        windowed = new.self_attn.window is not None
        old_seen.append(new.self_attn.log_sum_exp(q, k, state).flatten(0, 1) if windowed else old_all[-1])
        q, k, _ = new.self_attn.project(x)
        new_seen.append(new.self_attn.log_sum_exp(q, k, state).flatten(0, 1))
        state.shared.clear()
    target_Q = kept_mass(torch.cat(old_seen), torch.cat(old_all), old.self_attn.softmax_offset)
    target_Q = target_Q if order is None else target_Q[list(order)]
    return match_kept_mass(torch.cat(new_seen), target_Q, at_least_Q=before_Q).float()


@torch.no_grad()
def refit_output(layer: Layer, streams: Sequence[Row], targets: Sequence[Tensor], *, fit: Fit) -> dict[str, Tensor]:
    """The output projection that best turns the layer's own mixed values into the targets.

    The ridge pulls towards the projection that the layer has; the bias is fitted to the rounded weight.
    """
    attention = layer.self_attn
    start_HC = attention.o_proj.weight.double()
    sums = RidgeSums(start_HC.shape[1], start_HC.shape[0], device=start_HC.device)
    for (x_BTH, state), target_BTH in zip(streams, targets, strict=True):
        mixed = attention.attend(*attention.project(layer.input_layernorm(x_BTH)), state).flatten(0, 1).double()
        sums.add(mixed, target_BTH.flatten(0, 1).double() - mixed @ start_HC.T)
        state.shared.clear()
    change_HC, _ = sums.solve(ridge=fit.ridge)
    weight_HC = (start_HC + change_HC).bfloat16()
    # The bias meets the mean of the targets with the weight as it is stored.
    bias_H = sums.output_mean + (start_HC - weight_HC.double()) @ sums.input_mean
    return dict(zip(OUTPUT, (weight_HC, bias_H.bfloat16()), strict=True))


def _inputs(layer: Layer, streams: Sequence[Row]) -> Tensor:
    with torch.no_grad():
        return torch.cat([layer.input_layernorm(x).flatten(0, 1) for x, _ in streams])


def _attention_tensors(layer: Layer) -> dict[str, Tensor]:
    """The layer's attention in the checkpoint's dtypes, without the layer prefix."""
    pinned = {f"self_attn.{name}" for name in layer.self_attn.pinned_names()}
    state = {name: value for name, value in layer.state_dict().items() if name.startswith("self_attn.")}
    return {name: value if name in pinned else value.bfloat16() for name, value in state.items()}


def _assembled(old: Layer, config: StudentConfig, attention: Mapping[str, Tensor]) -> Layer:
    rest = {name: value for name, value in old.state_dict().items() if not name.startswith("self_attn.")}
    return layer_of({**rest, **attention}, config, number=old.number)
