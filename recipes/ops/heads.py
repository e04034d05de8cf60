"""Fewer attention heads: which to merge, and how, in closed form.

Place in the path: the conversion of the donor (16 query, 8 key/value heads) to the student (8 and 2). Pure functions of
weights and moments; the fits that need the model are in `recipes.model.convert_attention`.

Legend: Q query heads, J heads to merge, G groups, D head width, P = D / 2 rotary planes, H hidden, N rows.

Invariants: rotary planes are the pairs (i, i + D/2), seen as complex numbers x_i + i x_{i+D/2}; only maps that commute
with every rotation (a complex factor a plane) are applied to queries and keys. Merging equal heads changes nothing.

Example:
    >>> len(list(partitions(8)))
    35
"""

# ruff: noqa: N815 - fields carry their shapes as capital suffixes

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from recipes.ops.linear import hadamard, ruled_signs, symmetric_root
from recipes.ops.roots import square_root
from vpstore.errors import ShapeMismatch

Halves = tuple[tuple[int, ...], tuple[int, ...]]


class MergedValues(NamedTuple):
    """One value head for several, and what each of them is read off it with."""

    weight_DH: Tensor
    decoders_JDD: Tensor  # v_j ~ decoders[j] @ merged value
    lost: float  # share of the weighted energy that is not kept


class MergedKeys(NamedTuple):
    """One key head for several: complex factors a plane."""

    encode_JP: Tensor  # merged key = sum_j encode[j] * key_j
    decode_JP: Tensor  # key_j ~ decode[j] * merged key, so a query is multiplied by conj(decode[j])
    lost: float


def partitions(heads: int) -> Iterator[Halves]:
    """All ways to cut `heads` heads into two groups of equal size; the first holds head 0, in lexicographic order.

    Raises:  ShapeMismatch: an odd number of heads.
    """
    if heads % 2 or heads < 2:
        raise ShapeMismatch("heads do not divide into two groups", expected="an even number", found=str(heads))
    for rest in combinations(range(1, heads), heads // 2 - 1):
        first = (0, *rest)
        yield first, tuple(head for head in range(heads) if head not in first)


def fuse_qkv(q_QDX: Tensor, k_GDX: Tensor, v_GDX: Tensor) -> Tensor:
    """Rows per key/value group, [Q0..Q3 K0 V0 | Q4..Q7 K1 V1]; X is the hidden size, or nothing for a bias.

    Returns: [(Q + 2 G) * D, X] or [(Q + 2 G) * D].
    Raises:  ShapeMismatch: heads that do not divide into groups, or unequal widths.
    """
    queries, groups = len(q_QDX), len(k_GDX)
    if k_GDX.shape != v_GDX.shape or q_QDX.shape[1:] != k_GDX.shape[1:] or queries % groups:
        raise ShapeMismatch(
            "heads cannot be fused",
            expected="q [Q, D, …], k and v [G, D, …] with Q a multiple of G",
            found=f"{list(q_QDX.shape)}, {list(k_GDX.shape)}, {list(v_GDX.shape)}",
        )
    grouped = torch.unflatten(q_QDX, 0, (groups, -1))
    return torch.cat([grouped, k_GDX[:, None], v_GDX[:, None]], dim=1).flatten(0, 2)


def mean_heads(weight_NH: Tensor, *, heads: int, keep: int) -> Tensor:
    """Average neighbouring heads so that `heads` become `keep`.

    Args:    weight_NH: [heads * D, H], rows grouped by head.
    Returns: float64 [keep, D, H].
    Raises:  ShapeMismatch: rows or heads that do not divide.
    Source:  Ainslie et al. 2023, arXiv:2305.13245 (GQA).
    """
    if heads % keep or len(weight_NH) % heads:
        raise ShapeMismatch(
            "heads do not divide", expected=f"rows of {heads} heads, {keep} kept", found=str(list(weight_NH.shape))
        )
    return torch.unflatten(weight_NH.double(), 0, (keep, heads // keep, -1)).mean(1)


def sum_output_heads(weight_HN: Tensor, *, heads: int, keep: int) -> Tensor:
    """Add the output columns of neighbouring heads: two heads that agree contribute O_1 a + O_2 a = (O_1 + O_2) a.

    Returns: float64 [H, keep * D].
    Raises:  ShapeMismatch: columns or heads that do not divide.
    """
    if heads % keep or weight_HN.shape[1] % heads:
        raise ShapeMismatch(
            "heads do not divide", expected=f"columns of {heads} heads, {keep} kept", found=str(list(weight_HN.shape))
        )
    return torch.unflatten(weight_HN.double(), 1, (keep, heads // keep, -1)).sum(2).flatten(1)


def value_gains(o_HQD: Tensor, *, heads: int) -> Tensor:
    """How the output sees each value head: the sum of O^T O over the query heads that read it.

    Args:    o_HQD: output columns of each query head, those that read one value head adjacent; heads: J.
    Returns: float64 [J, D, D].
    """
    blocks = torch.unflatten(o_HQD.double(), 1, (heads, -1))
    return torch.einsum("hjqd,hjqe->jde", blocks, blocks)


def value_factors(weight_JDH: Tensor, gains_JDD: Tensor, covariance_HH: Tensor) -> Tensor:
    """Root of the values' covariance as the output sees it, head by head: gain^1/2 W cov^1/2.

    Args:    weight_JDH: projections. gains_JDD: from `value_gains`. covariance_HH: of their common input.
    Returns: float64 [J, D, H].
    """
    gain_JDD, _ = symmetric_root(gains_JDD)
    root_HH, _ = symmetric_root(covariance_HH)
    return gain_JDD @ weight_JDH.double() @ root_HH


def value_loss(factors_JDH: Tensor, group: Sequence[int], *, keep: int) -> float:
    """Energy that `keep` dimensions cannot hold of the group's values together.

    Args:    factors_JDH: from `value_factors`; group: heads.
    Returns: the sum of all but the `keep` largest eigenvalues, at least 0.
    """
    rows_NH = factors_JDH[list(group)].flatten(0, 1)
    small = rows_NH @ rows_NH.T if len(rows_NH) < rows_NH.shape[1] else rows_NH.T @ rows_NH
    values = torch.linalg.eigvalsh(small)
    return float(values[: max(len(values) - keep, 0)].clamp(min=0).sum())


def merge_values(weight_JDH: Tensor, gains_JDD: Tensor, covariance_HH: Tensor) -> MergedValues:
    """The head of D dimensions from which the J heads' contributions to the output are best recovered.

    The basis inside the merged head is free; it is turned by a Hadamard matrix, so that no row is left empty (an empty
    row under an empty output column would never get a gradient), and scaled to the mean energy of the merged heads.

    Args:    weight_JDH: projections. gains_JDD: from `value_gains`. covariance_HH: of their common input.
    Returns: float64, weight [D, H] and decoders [J, D, D].
    Source:  reduced-rank regression (Izenman 1975), with the outputs weighted by what reads them.
    """
    heads, width, hidden = weight_JDH.shape
    weight = weight_JDH.double()
    gain_JDD, inverse_JDD = symmetric_root(gains_JDD)
    factors_NH = value_factors(weight, gains_JDD, covariance_HH).flatten(0, 1)
    left_NR, singular_R, _ = torch.linalg.svd(factors_NH, full_matrices=False)
    kept = min(width, len(singular_R))
    basis_ND = weight.new_zeros(heads * width, width)
    basis_ND[:, :kept] = ruled_signs(left_NR[:, :kept])
    turned_ND = basis_ND @ hadamard(width, device=basis_ND.device)
    merged_DH = turned_ND.T @ (gain_JDD @ weight).flatten(0, 1)
    energy = torch.einsum("dh,hk,dk->", merged_DH, covariance_HH.double(), merged_DH)
    wanted = torch.einsum("jdh,hk,jdk->", weight, covariance_HH.double(), weight) / heads
    scale = float(square_root(wanted / energy)) if float(energy) > 0 else 1.0
    decoders_JDD = inverse_JDD @ torch.unflatten(turned_ND, 0, (heads, width)) / scale
    total = float(singular_R.square().sum())
    lost = float(singular_R[kept:].square().sum()) / total if total > 0 else 0.0
    return MergedValues(merged_DH * scale, decoders_JDD, lost)


def to_planes(x_D: Tensor) -> Tensor:
    """Rotary planes of the last dimension as complex numbers.

    Args:    x_D: real, [..., D]; the first half are the real parts.
    Returns: complex of the same precision, [..., P].
    """
    low, high = x_D.chunk(2, dim=-1)
    return torch.complex(low, high)


def from_planes(z_P: Tensor) -> Tensor:
    """The inverse of `to_planes`.

    Args:    z_P: complex, [..., P].
    Returns: real of the same precision, [..., D].
    """
    return torch.cat([z_P.real, z_P.imag], dim=-1)


def key_loss(moments_PJJ: Tensor, energy_JP: Tensor, group: Sequence[int]) -> float:
    """Weighted energy that one key head cannot hold of the group's keys, over all planes.

    Args:    moments_PJJ, energy_JP: as for `merge_keys`; group: heads.
    Returns: the sum of all but the largest eigenvalue of each plane, at least 0.
    """
    weighted = _weighted_moments(moments_PJJ, energy_JP, group)
    return float(torch.linalg.eigvalsh(weighted)[:, :-1].clamp(min=0).sum())


def merge_keys(moments_PJJ: Tensor, energy_JP: Tensor, group: Sequence[int]) -> MergedKeys:
    """Per plane the complex combination of the group's keys that their queries miss least.

    Args:    moments_PJJ: sums of key_j * conj(key_j') a plane, complex128. energy_JP: of the queries that read key j.
    Returns: complex128, encode and decode [J, P].
    Source:  complex principal components of the heads, plane by plane, weighted by the queries' energy.
    """
    members = list(group)
    weight_JP = square_root(energy_JP[members].double().clamp(min=1e-30))
    weighted = _weighted_moments(moments_PJJ, energy_JP, group)
    values_PJ, vectors_PJJ = torch.linalg.eigh(weighted)
    top_JP = ruled_signs(vectors_PJJ[:, :, -1:])[:, :, 0].T
    encode_JP, decode_JP = top_JP.conj() * weight_JP, top_JP / weight_JP
    moments = moments_PJJ[:, members][:, :, members]
    energy_P = torch.einsum("jp,pjk,kp->p", encode_JP, moments, encode_JP.conj()).real
    wanted_P = moments.diagonal(dim1=1, dim2=2).real.mean(1)
    scale_P = square_root(torch.where(energy_P > 0, wanted_P / energy_P.clamp(min=1e-300), 1.0)).clamp(min=1e-12)
    total = float(values_PJ.clamp(min=0).sum())
    lost = float(values_PJ[:, :-1].clamp(min=0).sum()) / total if total > 0 else 0.0
    return MergedKeys(encode_JP * scale_P, decode_JP / scale_P, lost)


def _weighted_moments(moments_PJJ: Tensor, energy_JP: Tensor, group: Sequence[int]) -> Tensor:
    members = list(group)
    weight_PJ = square_root(energy_JP[members].double().clamp(min=1e-30)).T
    return moments_PJJ[:, members][:, :, members] * weight_PJ[:, :, None] * weight_PJ[:, None, :]


def best_partition(losses: dict[tuple[int, ...], float], heads: int) -> Halves:
    """The cut into two groups with the smallest sum of losses; of equal ones the first in order."""
    return min(partitions(heads), key=lambda halves: losses[halves[0]] + losses[halves[1]])
