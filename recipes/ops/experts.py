"""The weights of the routed and the shared experts, cut from one dense feed-forward layer.

Place in the path: recipe -> **ops**. Pure: dense tensors in, expert tensors out, each tensor on its own, and some
experts at a time, as no tensors are larger than these.
Invariants: expert e carries slice e % S of the dense units, S = dense width / expert width; everything is computed in
float32; noise comes from the stream of the tensor's own name.

Methods.  R0: fc1 is the slice (with noise and re-drawn units), fc2 is zero: the routed part is exactly zero for any
router. R1: the shared expert keeps 1 - a of the output and each virtual group of top_k experts carries a.
R2: R1's split with noise on every weight and independent router rows: not function-preserving, an ablation.

Shapes: F dense units, W expert units, S slices, E experts, D model.

Example:
    >>> slice_units(torch.arange(8.0), experts=4, width=4)[:, 0]
    tensor([0., 4., 0., 4.])
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.ops.noise import chosen_units, normal_rows, row_ranges
from vpstore.errors import ShapeMismatch

_VALUES = 1 << 20  # of an expert tensor that are made at a time: what a core's cache holds


@dataclass(frozen=True)
class Draw:
    """Where an expert tensor's random numbers come from, and how many there are.

    noise is relative to the standard deviation of the dense matrix; drop is the share of each expert's units that are
    re-drawn from the dense matrix' normal distribution; units names the stream that both tensors of fc1 share.
    """

    seed: int
    name: str
    units: str
    noise: float = 0.0
    drop: float = 0.0


def slice_units(dense: Tensor, *, experts: int, width: int) -> Tensor:
    """Deal the dense units out: expert e gets units [q*W, (q+1)*W) with q = e % (F / W).

    Args:    dense: [F, ...], units first.
    Returns: [E, W, ...] in the dtype of `dense`, a fresh tensor.
    Raises:  ShapeMismatch: F is no multiple of W, or E no multiple of the number of slices.
    Source:  He et al. 2024, arXiv:2410.07524 (virtual groups).
    """
    return _dealt(_slices(dense, experts=experts, width=width), 0, experts)


def _slices(dense: Tensor, *, experts: int, width: int) -> Tensor:
    """The slices [S, W, ...] that are dealt out in turn."""
    units = dense.shape[0]
    if units % width or experts % (units // width):
        raise ShapeMismatch(
            "the dense layer does not divide into expert slices",
            where=f"{units} units, experts of {width}",
            expected="whole slices, and as many experts of each",
            found=f"{experts} experts",
            next_step="change ffn_hidden_size, expert_hidden_size or num_experts",
        )
    return dense.reshape(units // width, width, *dense.shape[1:])


def _dealt(slices_SW: Tensor, start: int, stop: int) -> Tensor:
    """The slices of experts start .. stop."""
    return slices_SW[torch.arange(start, stop) % len(slices_SW)]


def expert_fc1(dense: Tensor, *, experts: int, width: int, scale: float, draw: Draw) -> Iterator[Tensor]:
    """First layer of the routed experts, weight or bias: scaled slice, plus noise, with some units re-drawn.

    Args:    dense: weight [F, D] or bias [F]; scale: 1 for R0.
    Returns: float32 [E, W, D] or [E, W], some experts at a time.
    Source:  Nakamura et al. 2025, arXiv:2502.19261 (Drop-Upcycling) for the re-drawn units.
    """
    source_SW = _slices(dense.float(), experts=experts, width=width)
    shape = (experts, *source_SW.shape[1:])
    mean, std = _moments(dense.float())
    ranges = row_ranges(shape, values=_VALUES)
    noise, redrawn = (
        normal_rows(shape, ranges, draw=(draw.seed, f"{draw.name}#{kind}"), mean=mean_, std=std_ * scale)
        for kind, mean_, std_ in (("noise", 0.0, draw.noise * std), ("drop", mean * scale, std))
    )
    chosen_EW = chosen_units(experts, width, draw.drop, seed=draw.seed, name=f"{draw.units}#units")
    for start, stop in ranges:
        out = _dealt(source_SW, start, stop).mul_(scale)
        if draw.noise > 0:
            out += next(noise)
        if draw.drop > 0:
            chosen = chosen_EW[start:stop].reshape(-1, width, *([1] * (out.dim() - 2)))
            out = torch.where(chosen, next(redrawn), out)
        yield out


def expert_fc2(dense_DF: Tensor, *, experts: int, width: int, scale: float, draw: Draw) -> Iterator[Tensor]:
    """Second layer of the routed experts; scale 0 (R0) gives exact zeros whatever the noise.

    Args:    dense_DF: [D, F].
    Returns: float32 [E, D, W], some experts at a time.
    """
    shape = (experts, dense_DF.shape[0], width)
    ranges = row_ranges(shape, values=_VALUES)
    if scale == 0.0:
        yield from (torch.zeros((stop - start, *shape[1:])) for start, stop in ranges)
        return
    source_SWD = _slices(dense_DF.float().T.contiguous(), experts=experts, width=width)
    std = draw.noise * _moments(dense_DF.float())[1] * scale
    noise = normal_rows(shape, ranges, draw=(draw.seed, f"{draw.name}#noise"), mean=0.0, std=std)
    for start, stop in ranges:
        out = _dealt(source_SWD, start, stop).mul_(scale).transpose(1, 2).contiguous()
        yield out + next(noise) if draw.noise > 0 else out


def routed_scale(share: float, *, top_k: int, routed_scaling: float) -> float:
    """The factor t on fc1, its bias and fc2 with which one whole virtual group carries `share` of the output.

    Every gate of a group with equal scores is routed_scaling / top_k, and a weight scale t passes the squared ReLU
    twice and fc2 once: (routed_scaling / top_k) * t^3 = share.

    Args:    0 <= share <= 1.
    Returns: t; 1.1696 for share 1, top 4 and scaling 2.5; 1 exactly for share = scaling / top_k.
    """
    ratio = share * top_k / routed_scaling
    return 1.0 if ratio == 1.0 else float(ratio ** (1.0 / 3.0))


def _moments(values: Tensor) -> tuple[float, float]:
    """Mean and population standard deviation in float64."""
    wide = values.double()
    return float(wide.mean()), float(wide.std(correction=0))
