"""A gated SiLU feed-forward as an ungated squared-ReLU one.

Place in the path: the conversion of the donor. The donor computes W_d (silu(g) * u) with g = W_g x and u = W_u x. Two
squared-ReLU units with the rows W_g + s W_u and W_g - s W_u represent one gated neuron:
    relu(g + s u)^2 - relu(g - s u)^2 = 4 s g u   where |s u| <= g,   and 0 where |s u| <= -g,
so width F holds F / 2 gated neurons with the right nonlinearity. Which neurons: greedily, by what each adds to the
least squares fit of the output. The output projection and its bias are then fitted anew.

Legend: T tokens, H hidden, N neurons of the donor, F width of the student.

Invariants: ties go to the lowest neuron; the number of tokens bounds memory only through the caller.

Example:
    >>> pair_rows(torch.eye(2), torch.eye(2), torch.tensor([0.5, 0.5])).shape
    torch.Size([4, 2])
"""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.ops.roots import square_root
from vpstore.errors import ShapeMismatch


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2.

    Returns: same shape and dtype.
    """
    return torch.relu(x).square()


def pair_rows(gate_NH: Tensor, up_NH: Tensor, scale_N: Tensor) -> Tensor:
    """Input rows of the pairs: all W_g + s W_u, then all W_g - s W_u.

    Args:    gate_NH, up_NH: [N, H]; scale_N: s of each pair.
    Returns: the inputs' dtype, [2 N, H].
    Raises:  ShapeMismatch: gate, up and scales of unequal length.
    """
    if gate_NH.shape != up_NH.shape or scale_N.shape != gate_NH.shape[:1]:
        raise ShapeMismatch(
            "gate, up and scales do not belong together",
            expected="[N, H], [N, H], [N]",
            found=f"{list(gate_NH.shape)}, {list(up_NH.shape)}, {list(scale_N.shape)}",
        )
    shifted_NH = scale_N[:, None] * up_NH
    return torch.cat([gate_NH + shifted_NH, gate_NH - shifted_NH])


def pair_scales(gate_std_N: Tensor, up_std_N: Tensor, *, share: float) -> Tensor:
    """Scale s = share * std(g) / std(u): small enough for |s u| <= g, large enough against rounding.

    Args:    gate_std_N, up_std_N: standard deviations of g and u over the tokens.
    Returns: same dtype, [N]; a std(u) below 1e-12 counts as 1e-12.
    """
    return share * gate_std_N / up_std_N.clamp(min=1e-12)


def pair_features(gate_TN: Tensor, up_TN: Tensor, scale_N: Tensor) -> Tensor:
    """What a pair adds up to, in units of the gated neuron: about relu(g) * u.

    Args:    gate_TN, up_TN: g and u, [T, N]; scale_N: s of each pair.
    Returns: same dtype, [T, N].
    """
    shifted_TN = scale_N * up_TN
    return (relu_squared(gate_TN + shifted_TN) - relu_squared(gate_TN - shifted_TN)) / (4 * scale_N).clamp(min=1e-30)


def select_greedily(gram_NN: Tensor, cross_NH: Tensor, count: int) -> list[int]:
    """Forward selection: one after the other, the feature that lowers the squared error of the fit most.

    Args:    gram_NN, cross_NH: centred moments of the features, and of features with outputs.
    Returns: `count` different features in the order of their choice; of equal ones the lowest first.
    Raises:  ShapeMismatch: more features wanted than there are, or moments that do not fit.
    Source:  orthogonal least squares (Chen, Cowan, Grant 1991), as a pivoted Cholesky factorisation.
    """
    size = len(gram_NN)
    if gram_NN.shape != (size, size) or len(cross_NH) != size or not 0 <= count <= size:
        raise ShapeMismatch(
            "features cannot be selected",
            expected=f"[N, N], [N, H] and at most N = {size} features",
            found=f"{list(gram_NN.shape)}, {list(cross_NH.shape)}, {count} features",
        )
    left_N = gram_NN.diagonal().double().clone()
    floor_N = 1e-9 * left_N.clamp(min=1e-300)
    cross_NH = cross_NH.double().clone()
    factor_NC = gram_NN.new_zeros(size, count, dtype=torch.float64)
    is_taken_N = torch.zeros(size, dtype=torch.bool, device=gram_NN.device)
    chosen: list[int] = []
    for step in range(count):
        gain_N = cross_NH.square().sum(1) / torch.maximum(left_N, floor_N)
        best = int(gain_N.masked_fill(is_taken_N, -1.0).argmax())
        chosen.append(best)
        is_taken_N[best] = True
        pivot = square_root(torch.maximum(left_N[best], floor_N[best]))
        column_N = (gram_NN[:, best].double() - factor_NC[:, :step] @ factor_NC[best, :step]) / pivot
        factor_NC[:, step] = column_N
        cross_NH -= torch.outer(column_N, cross_NH[best] / pivot)
        left_N -= column_N.square()
    return chosen


def select_by_norm(up_NH: Tensor, down_HN: Tensor, count: int) -> list[int]:
    """The neurons with the largest ||up row|| * ||down column||, in their own order; of equal ones the lowest."""
    weight_N = up_NH.double().norm(dim=1) * down_HN.double().norm(dim=0)
    order_N = weight_N.sort(descending=True, stable=True).indices[:count]
    return sorted(order_N.tolist())
