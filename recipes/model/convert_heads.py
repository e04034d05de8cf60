"""What the student's heads should be, as the donor's heads have it: grouping, merging, and the wishes of a fit.

Place in the path: recipe -> **model**; `recipes.model.convert_attention` fits a layer to what is wished here. In order:
look at the donor on the calibration rows; cut its key/value heads into two groups; merge values (reduced-rank
regression) and keys (a complex factor a rotary plane); choose which of two donor queries each student head follows.

Invariants: student head s reads donor key/value head `order[s]`; heads 0..3 share the first group; groups, and heads
inside them, stand by attention distance, nearest first (those places get the steep slopes when the model becomes real);
ties go to the lowest head.

Shapes: B batch, T tokens, N donor query heads, J donor key/value heads, S student query heads, G student key/value
heads, D head width, P = D / 2 rotary planes, H hidden.

Example:
    >>> seen = look(donor_layer, donor_rows)
    >>> merger = merge_heads(donor_layer, seen)
"""

# ruff: noqa: N815 - fields carry their shapes as capital suffixes

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from recipes.model.donor import DonorLayer, DonorState, RmsNorm
from recipes.ops import heads as merging
from recipes.ops.heads import Halves, MergedKeys, MergedValues, from_planes, to_planes
from recipes.ops.linear import RidgeSums
from recipes.ops.roots import square_root

CANDIDATES = 3  # a student head may follow the first query of its pair, the second, or their mean


class DonorRow(NamedTuple):
    """The donor's stream on one batch, and what its layers share."""

    x_BTH: Tensor
    state: DonorState


@dataclass(frozen=True)
class Seen:
    """What the donor's attention does on the calibration rows."""

    covariance_HH: Tensor  # of the normalised input, centred: a constant value passes into the output's bias
    moments_PJJ: Tensor  # of the keys after their norm, a plane
    energy_JP: Tensor  # of the queries that read each key head
    distance_J: Tensor  # mean attention distance in tokens
    outputs: list[Tensor]  # [B, T, H], attention's contribution to the stream


@dataclass(frozen=True)
class Merger:
    """Which donor heads each student head stands for, and how their keys and values are merged."""

    order: tuple[int, ...]  # donor key/value head of each student query head
    values: tuple[MergedValues, ...]
    keys: tuple[MergedKeys, ...]
    follows: tuple[int, ...]  # candidate of each student head


class Wish(NamedTuple):
    """What the student's heads should be on some tokens."""

    raw_TO: Tensor  # fused rows before the norms
    q_TSD: Tensor  # after the norms
    k_TGD: Tensor


@torch.no_grad()
def look(layer: DonorLayer, rows: Sequence[DonorRow]) -> Seen:
    """Moments and outputs of the donor's attention."""
    attention, config = layer.self_attn, layer.self_attn.config
    heads, planes = config.num_key_value_heads, config.head_dim // 2
    weight = attention.o_proj.weight
    inputs = RidgeSums(config.hidden_size, 0, device=weight.device)
    moments_PJJ = weight.new_zeros(planes, heads, heads, dtype=torch.complex128)
    energy_JP = weight.new_zeros(heads, planes, dtype=torch.float64)
    distance_N, tokens = weight.new_zeros(config.num_attention_heads, dtype=torch.float64), 0
    outputs = []
    for x_BTH, state in rows:
        x_BTH = layer.input_layernorm(x_BTH)
        q, k, v = attention.project(x_BTH)
        flat_TH = x_BTH.flatten(0, 1)
        inputs.add(flat_TH, flat_TH[:, :0])
        z_TJP = to_planes(k.flatten(0, 1).double())
        moments_PJJ += torch.einsum("tjp,tkp->pjk", z_TJP, z_TJP.conj())
        q_TJXP = torch.unflatten(to_planes(q.flatten(0, 1).double()), 1, (heads, -1))
        energy_JP += q_TJXP.abs().square().sum((0, 2))
        place_T = torch.arange(k.shape[1], dtype=k.dtype, device=k.device)
        # The places travel as one more column of the values: the patterns are made once for both.
        v_BTJX = torch.cat([v, place_T.expand(k.shape[0], heads, -1).mT[..., None]], dim=-1)
        mixed_BTNX = torch.unflatten(attention.attend(q, k, v_BTJX, state), -1, (config.num_attention_heads, -1))
        outputs.append(attention.o_proj(mixed_BTNX[..., :-1].flatten(2)))
        distance_N += (place_T[:, None] - mixed_BTNX[..., -1]).double().sum((0, 1))
        tokens += len(flat_TH)
    distance_J = torch.unflatten(distance_N / tokens, 0, (heads, -1)).mean(1)
    return Seen(inputs.covariance()[0], moments_PJJ, energy_JP, distance_J, outputs)


def merge_heads(layer: DonorLayer, seen: Seen) -> Merger:
    """Partition of the key/value heads and the merged values and keys; which queries to follow is still open."""
    attention, config = layer.self_attn, layer.self_attn.config
    heads, width = config.num_key_value_heads, config.head_dim
    weight_JDH = torch.unflatten(attention.v_proj.weight, 0, (heads, width))
    blocks_HND = torch.unflatten(attention.o_proj.weight, 1, (-1, width))
    gains_JDD = merging.value_gains(blocks_HND, heads=heads)
    order, halves = _grouped(seen, merging.value_factors(weight_JDH, gains_JDD, seen.covariance_HH), width)
    values = tuple(merging.merge_values(weight_JDH[list(h)], gains_JDD[list(h)], seen.covariance_HH) for h in halves)
    keys = tuple(merging.merge_keys(seen.moments_PJJ, seen.energy_JP, half) for half in halves)
    return Merger(order, values, keys, (0,) * len(order))


def _grouped(seen: Seen, factors_JDH: Tensor, width: int) -> tuple[tuple[int, ...], Halves]:
    """The cut with the smallest loss, keys and values each in units of their whole energy, ordered by distance."""
    heads = len(factors_JDH)
    value_total = float(factors_JDH.square().sum()) or 1.0
    key_total = float((seen.moments_PJJ.diagonal(dim1=1, dim2=2).real.T * seen.energy_JP).sum()) or 1.0
    losses = {
        half: merging.value_loss(factors_JDH, half, keep=width) / value_total
        + merging.key_loss(seen.moments_PJJ, seen.energy_JP, half) / key_total
        for halves in merging.partitions(heads)
        for half in halves
    }
    distance = seen.distance_J.tolist()
    halves = [tuple(sorted(half, key=lambda j: (distance[j], j))) for half in merging.best_partition(losses, heads)]
    halves.sort(key=lambda half: (sum(distance[j] for j in half), half))
    return halves[0] + halves[1], (halves[0], halves[1])


def _queries(layer: DonorLayer, merger: Merger, x_TH: Tensor) -> tuple[Tensor, Tensor]:
    """The donor's queries as the merged keys want them, all candidates of each student head.

    Returns: [T, S, C, D] after the norm, and the length that each had before it, [T, S, C].
    """
    attention, config = layer.self_attn, layer.self_attn.config
    raw_TND = torch.unflatten(attention.q_proj(x_TH), -1, (-1, config.head_dim))
    size_TJX = torch.unflatten(_size(raw_TND, attention.q_norm), 1, (config.num_key_value_heads, -1))
    q_TJXD = torch.unflatten(attention.q_norm(raw_TND), 1, (config.num_key_value_heads, -1))
    order = list(merger.order)
    decode_SP = torch.cat([merged.decode_JP for merged in merger.keys]).to(torch.complex64)
    turned_TSXP = to_planes(q_TJXD[:, order]) * decode_SP.conj()[:, None]
    both_TSXD, sizes = from_planes(turned_TSXP), size_TJX[:, order]
    mean_TSXD = both_TSXD.mean(2, keepdim=True)
    return torch.cat([both_TSXD, mean_TSXD], 2), torch.cat([sizes, sizes.mean(2, keepdim=True)], 2)


def _keys(layer: DonorLayer, merger: Merger, x_TH: Tensor) -> tuple[Tensor, Tensor]:
    """Merged keys after the norm [T, G, D], and the length that such a key had before it, [T, G]."""
    attention, config = layer.self_attn, layer.self_attn.config
    raw_TJD = torch.unflatten(attention.k_proj(x_TH), -1, (-1, config.head_dim))
    groups = len(merger.keys)
    members = torch.unflatten(torch.tensor(merger.order, device=x_TH.device), 0, (groups, -1))
    z_TJP = to_planes(attention.k_norm(raw_TJD))
    merged = [
        torch.einsum("tjp,jp->tp", z_TJP[:, half], keys.encode_JP.to(torch.complex64))
        for half, keys in zip(members, merger.keys, strict=True)
    ]
    size_TGJ = _size(raw_TJD, attention.k_norm)[:, members]
    return from_planes(torch.stack(merged, 1)), square_root(size_TGJ.square().mean(2))


def _values(merger: Merger, x_TH: Tensor) -> Tensor:
    """Merged values [T, G, D]."""
    return torch.stack([x_TH @ merged.weight_DH.T.to(x_TH.dtype) for merged in merger.values], 1)


def _size(raw: Tensor, norm: RmsNorm) -> Tensor:
    return square_root(raw.square().mean(-1) + norm.eps)


def wish(layer: DonorLayer, merger: Merger, x_TH: Tensor) -> Wish:
    """What the fused projection should give where the donor has the normalised stream x."""
    attention = layer.self_attn
    q_TSCD, size_TSC = _queries(layer, merger, x_TH)
    heads = torch.arange(len(merger.order), device=x_TH.device)
    follows = torch.tensor(merger.follows, device=x_TH.device)
    q_TSD, q_size_TS = q_TSCD[:, heads, follows], size_TSC[:, heads, follows]
    k_TGD, k_size_TG = _keys(layer, merger, x_TH)
    q_raw = q_TSD * q_size_TS[..., None] / _divisor(attention.q_norm.weight)
    k_raw = k_TGD * k_size_TG[..., None] / _divisor(attention.k_norm.weight)
    by_head = merging.fuse_qkv(q_raw.movedim(0, -1), k_raw.movedim(0, -1), _values(merger, x_TH).movedim(0, -1))
    return Wish(by_head.T, q_TSD, k_TGD)


def _divisor(gain_D: Tensor) -> Tensor:
    """The gain, kept away from zero: a direction that the norm deletes cannot be wished for."""
    floor = 1e-3 * gain_D.abs().mean()
    return torch.where(gain_D.abs() < floor, floor, gain_D)


def followed(layer: DonorLayer, merger: Merger, rows: Sequence[DonorRow]) -> tuple[int, ...]:
    """For each student head the candidate from whose output the pair's contribution is best recovered."""
    attention, config = layer.self_attn, layer.self_attn.config
    heads, width = len(merger.order), config.head_dim
    pairs_SHX = _pair_outputs(layer, merger)
    empty = partial(RidgeSums, width, config.hidden_size, device=pairs_SHX.device)
    sums = [[empty() for _ in range(CANDIDATES)] for _ in range(heads)]
    for x_BTH, state in rows:
        x_BTH = layer.input_layernorm(x_BTH)
        shape = x_BTH.shape[:2]
        own_TJE = torch.unflatten(attention.attend(*attention.project(x_BTH), state).flatten(0, 1), -1, (heads, -1))
        q_TSCD, _ = _queries(layer, merger, x_BTH.flatten(0, 1))
        k_TGD, v_TGD = _keys(layer, merger, x_BTH.flatten(0, 1))[0], _values(merger, x_BTH.flatten(0, 1))
        for candidate in range(CANDIDATES):
            q_BTSD = torch.unflatten(q_TSCD[:, :, candidate], 0, shape)
            # The donor's own attention, each merged head given once for every two queries that share it.
            share = heads // len(merger.keys) // 2
            k, v = (torch.unflatten(y.repeat_interleave(share, 1), 0, shape) for y in (k_TGD, v_TGD))
            mixed_TSD = torch.unflatten(attention.attend(q_BTSD, k, v, state).flatten(0, 1), -1, (heads, width))
            for head, donor_head in enumerate(merger.order):
                sums[head][candidate].add(mixed_TSD[:, head], own_TJE[:, donor_head] @ pairs_SHX[head].T)
    scores = torch.tensor([[s.explained(*s.solve(ridge=1e-4)) for s in row] for row in sums], device="cpu")
    return tuple(scores.argmax(1).tolist())


def _pair_outputs(layer: DonorLayer, merger: Merger) -> Tensor:
    """Output columns of the two queries behind each student head, [S, H, 2 D]."""
    config = layer.self_attn.config
    blocks_HJX = torch.unflatten(layer.self_attn.o_proj.weight, 1, (config.num_key_value_heads, -1))
    return blocks_HJX[:, list(merger.order)].movedim(1, 0)
