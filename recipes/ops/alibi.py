"""From rotary positions to none with linear biases: what each rotary plane is worth once it no longer turns.

Place in the path: recipe -> **ops**. Pure; morph_real uses it on global layers.
Invariants: planes are the half-split pairs (f, f + d/2); all sums are float64; offsets are i - j >= 0.

Shapes: O offsets, f rotary planes (d = 2f dims a head), h heads, g KV groups, D model, T tokens.

Example:
    >>> plane_gains(torch.tensor([1.0, 0.0]), torch.tensor([0.3]))
    tensor([1.], dtype=torch.float64)
"""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.ops.roots import square_root


def offset_mass(pattern_BHTT: Tensor, offset_BTT: Tensor, *, offsets: int) -> Tensor:
    """Attention mass that each head spends on each offset.

    Args:    pattern_BHTT: probabilities, zero where nothing is attended; offset_BTT: integers, i - j within a document
             (values outside 0..offsets-1 must carry no mass and are ignored).
    Returns: float64 [h, O], summed over batch and queries.
    """
    heads = pattern_BHTT.shape[1]
    inside = (offset_BTT >= 0) & (offset_BTT < offsets)
    index = offset_BTT[inside]
    mass_HO = torch.zeros((heads, offsets), dtype=torch.float64, device=pattern_BHTT.device)
    for head in range(heads):
        mass_HO[head].index_add_(0, index, pattern_BHTT[:, head][inside].double())
    return mass_HO


def mean_distance(mass_HO: Tensor) -> Tensor:
    """Mean attended offset of each head, in tokens.

    Args:    mass_HO: [h, O], from `offset_mass`.
    Returns: float64 [h]; 0 for a head without mass.
    """
    offsets_O = torch.arange(mass_HO.shape[1], dtype=torch.float64, device=mass_HO.device)
    total_H = mass_HO.sum(dim=1)
    return (mass_HO @ offsets_O) / torch.where(total_H > 0, total_H, torch.ones_like(total_H))


def plane_gains(mass_O: Tensor, freq_f: Tensor) -> Tensor:
    """The best position-free stand-in for each rotary plane: its mean rotation, a_f = E[cos(w_f * offset)].

    A slow plane keeps a gain near 1; a fast one averages to about 0 and would only inject noise if it stayed.

    Args:    mass_O: weights of the offsets 0, 1, ..., not all zero; freq_f: radians a token.
    Returns: float64 [f] in [-1, 1].
    """
    weight_O = mass_O.double() / mass_O.double().sum()
    offsets_O = torch.arange(mass_O.shape[0], dtype=torch.float64, device=mass_O.device)
    return torch.cos(torch.outer(freq_f.double(), offsets_O)) @ weight_O


def split_gains(gain_f: Tensor, *, floor: float) -> tuple[Tensor, Tensor]:
    """Share plane gains between the query's and the key's norm weights: sqrt(|a|) each, the sign on the query.

    Args:    floor: magnitude below which a gain is lifted (keeping its sign, zero counts as positive): a plane that
             is zero on both sides has no gradient and would be lost for good.
    Returns: factors for q_norm and k_norm, float64 [2f], for both halves of each plane.
    """
    sign_f = torch.where(gain_f < 0, -1.0, 1.0).double()
    root_f = square_root(gain_f.abs().double().clamp_min(floor))
    return torch.cat([sign_f * root_f] * 2), torch.cat([root_f] * 2)


def order_by_distance(distance_H: Tensor, *, groups: int) -> tuple[int, ...]:
    """Head order that puts short-sighted heads on steep slopes without splitting a KV group.

    Groups are sorted by the mean distance of their heads, heads by their own distance inside the group; equal
    distances keep the order they had.

    Args:    distance_H: [h], heads of one group adjacent.
    Returns: old head index for each new place.
    """
    size = distance_H.shape[0] // groups
    distance_GS = distance_H.double().reshape(groups, size)
    group_order = torch.argsort(distance_GS.mean(dim=1), stable=True).tolist()
    inner = torch.argsort(distance_GS, dim=1, stable=True).tolist()
    return tuple(group * size + head for group in group_order for head in inner[group])


def permute_qkv(qkv: Tensor, order: tuple[int, ...], *, groups: int, head_dim: int) -> Tensor:
    """Reorder the heads of a fused projection, weight or bias, stored per KV group [Q.. K V | Q.. K V].

    Args:    qkv: [(h + 2g) * d, ...]; order: old head for each new place, never splitting a group.
    Returns: same shape and dtype; keys and values follow their group.
    """
    size = len(order) // groups
    blocks = qkv.reshape(groups, size + 2, head_dim, *qkv.shape[1:])
    out = torch.empty_like(blocks)
    for place in range(groups):
        group = order[place * size] // size
        rows = [order[place * size + n] % size for n in range(size)] + [size, size + 1]
        out[place] = blocks[group][rows]
    return out.reshape(qkv.shape)


def permute_output(o_DC: Tensor, order: tuple[int, ...], *, head_dim: int) -> Tensor:
    """Reorder the columns of the output projection to match heads in `order`.

    Args:    o_DC: [D, h * d].
    Returns: same shape and dtype.
    """
    blocks = o_DC.reshape(o_DC.shape[0], len(order), head_dim)
    return blocks[:, list(order)].reshape(o_DC.shape)
