"""From fused linear projections to tensor product factors: q, k, v as products of two linear maps of the same input.

Place in the path: recipe -> **ops**. Pure; morph_real uses it on local layers.
Invariants: fits are float64; factors are kept without the 1/R of the model's composition, which `stored` puts into A;
a step of alternating least squares never raises the weighted error it fits.

The two constructions. A linear map needs a constant A, but A is linear without bias; so A is built on w.x ~ 1, the
least-squares constant. With rank = heads, A = diag(w.x) and the map is multiplied by c(x) = w.x, which the norm on
keys cancels; with rank < heads, the heads are projected on the best subspace of that rank.

Shapes: T tokens, D model, N heads of one kind, R rank, d head dimension.

Example:
    >>> factors = constant_factors(w_D, head_weights_NdD, head_biases_Nd)
    >>> compose(factors, x_TD).shape
    torch.Size([100, 2, 128])
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.ops.linear import RidgeSums, ruled_signs, solve_ridge
from recipes.ops.roots import square_root


@dataclass(frozen=True)
class Factors:
    """One of q, k, v: head n of token x is sum_r (a_nr . x) (B_r x) + bias_n, all float64."""

    a_NRD: Tensor  # shape letters
    b_RdD: Tensor
    bias_Nd: Tensor


def compose(factors: Factors, x_TD: Tensor) -> Tensor:
    """What the factors make of the inputs, in float64.

    Returns: [T, N, d].
    """
    x = x_TD.double()
    a_TNR = torch.einsum("td,nrd->tnr", x, factors.a_NRD)
    b_TRd = torch.einsum("tj,rdj->trd", x, factors.b_RdD)
    return torch.einsum("tnr,trd->tnd", a_TNR, b_TRd) + factors.bias_Nd


def stored(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """The factors as the model's parameters, float32.

    Returns: A [N*R, D] times R (the model divides by it), B [R*d, D], bias [N*d]; row-major (head, rank), (rank, dim).
    """
    rank = factors.a_NRD.shape[1]
    a = (factors.a_NRD * rank).flatten(0, 1)
    return a.float(), factors.b_RdD.flatten(0, 1).float(), factors.bias_Nd.flatten().float()


def constant_direction(x_TD: Tensor, *, ridge: float) -> Tensor:
    """The w that makes w.x most nearly 1: argmin E(1 - w.x)^2 + ridge.

    Args:    ridge: relative to the mean diagonal of E[x x^T].
    Returns: float64 [D].
    """
    x = x_TD.double()
    return solve_ridge(x.T @ x / x.shape[0], x.mean(dim=0)[:, None], ridge=ridge)[:, 0]


def constant_factors(w_D: Tensor, heads_NdD: Tensor, bias_Nd: Tensor) -> Factors:
    """Rank N for N heads: head n becomes c(x) W_n x + b_n/2 + c(x)^2 b_n/2, c = w.x.

    Without a bias that is c(x) times the head, which a norm cancels exactly (up to its eps) wherever c(x) > 0. A bias
    is split in two halves: one is carried beside the product, one folded into B through w, so that after dividing by
    c the bias is off by the factor (c + 1/c)/2 = 1 + O((c-1)^2) instead of 1/c or c.

    Args:    w_D: from `constant_direction`. heads_NdD: weight rows of each head; bias_Nd: [N, d].
    Returns: float64.
    """
    w, bias = w_D.double(), bias_Nd.double() / 2
    heads = heads_NdD.shape[0]
    a_NRD = torch.eye(heads, dtype=torch.float64, device=w.device)[:, :, None] * w
    return Factors(a_NRD, heads_NdD.double() + bias[:, :, None] * w, bias)


def fitted_factors(w_D: Tensor, x_TD: Tensor, target_TNd: Tensor, *, start_NdD: Tensor, ridge: float) -> Factors:
    """Rank N for N heads where the scale matters (values): best B and bias for A = diag(w.x).

    Args:    start_NdD: the map the ridge pulls towards.
    Returns: the bias carries the mean of what is left.
    """
    linear_NdD, mean_D = _fit_scaled(w_D, x_TD, target_TNd, start_NdD=start_NdD, ridge=ridge)
    a_NRD = torch.eye(len(linear_NdD), dtype=torch.float64, device=w_D.device)[:, :, None] * w_D.double()
    bias_Nd = target_TNd.double().mean(dim=0) - linear_NdD @ mean_D
    return Factors(a_NRD, linear_NdD, bias_Nd)


def low_rank_factors(
    w_D: Tensor, x_TD: Tensor, target_TNd: Tensor, *, start_NdD: Tensor, rank: int, ridge: float
) -> Factors:
    """Rank R < N (queries): the heads' linear maps, projected on the subspace that keeps most of what they do.

    Heads are scaled to equal energy first, because the norm behind them ignores their size; the singular vectors are
    those of the N x (d*D) matrix of maps weighted by the covariance of c(x) x, found from its N x N Gram matrix. Each
    head's mean is carried by its bias and costs no rank.

    Args:    w_D: from `constant_direction`. x_TD, target_TNd: inputs, and what each head should give. start_NdD: the
             map the ridge pulls towards; rank: R; ridge: relative to the mean diagonal of the system.
    Returns: float64, A [N, R, D], B [R, d, D], bias [N, d].
    """
    linear_NdD, mean_D = _fit_scaled(w_D, x_TD, target_TNd, start_NdD=start_NdD, ridge=ridge)
    features = _scaled(w_D, x_TD) - mean_D
    covariance = features.T @ features / features.shape[0]
    target = target_TNd.double()
    energy_N = target.square().sum(dim=2).mean(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    scaled_NdD = linear_NdD / square_root(energy_N)[:, None, None]
    basis_NR = principal_heads(torch.einsum("ndi,ij,mdj->nm", scaled_NdD, covariance, scaled_NdD), rank)
    b_RdD = torch.einsum("nr,ndj->rdj", basis_NR, scaled_NdD)
    a_NRD = (basis_NR * square_root(energy_N)[:, None])[:, :, None] * w_D.double()
    free = Factors(a_NRD, b_RdD, torch.zeros_like(target[0]))
    return Factors(a_NRD, b_RdD, (target - compose(free, x_TD)).mean(dim=0))


def principal_heads(gram_NN: Tensor, rank: int) -> Tensor:
    """Leading eigenvectors of a Gram matrix between heads, largest first.

    Returns: float64 [N, R]; the entry of largest magnitude of each vector is positive (the first of equal ones).
    """
    return ruled_signs(torch.linalg.eigh(gram_NN.double()).eigenvectors.flip(1)[:, :rank])


def direction_weights(target_TNd: Tensor) -> Tensor:
    """Weights that count every head of every token by its direction alone: 1 / |target|^2.

    Returns: float64 [T, N]; a zero target weighs nothing.
    """
    energy_TN = target_TNd.double().square().sum(dim=2)
    return torch.where(energy_TN > 0, 1.0 / energy_TN.clamp_min(torch.finfo(torch.float64).tiny), 0.0)


def sweep(factors: Factors, x_TD: Tensor, target_TNd: Tensor, weight_TN: Tensor, *, ridge: float) -> Factors:
    """One round of alternating least squares: B and the bias with A fixed, then A with those fixed.

    Both factors are free functions of the token afterwards. The ridge pulls towards the factors given, so the weighted
    error cannot rise.

    Args:    x_TD, target_TNd: inputs, and what each head should give. weight_TN: >= 0; ridge: relative to the mean
             diagonal of each system.
    Returns: float64, the shapes of the factors given.
    """
    half = _sweep_b(factors, x_TD.double(), target_TNd.double(), weight_TN, ridge=ridge)
    return _sweep_a(half, x_TD.double(), target_TNd.double(), weight_TN, ridge=ridge)


def _sweep_b(factors: Factors, x: Tensor, target: Tensor, weight: Tensor, *, ridge: float) -> Factors:
    heads, rank, width = factors.a_NRD.shape
    a_TNR = torch.einsum("tj,nrj->tnr", x, factors.a_NRD)
    size = rank * width
    gram = x.new_zeros((size + heads, size + heads))
    cross_TNR = weight[:, :, None] * a_TNR
    for r in range(rank):
        rows = slice(r * width, (r + 1) * width)
        for s in range(r, rank):
            columns = slice(s * width, (s + 1) * width)
            block = (x * (cross_TNR[:, :, r] * a_TNR[:, :, s]).sum(dim=1)[:, None]).T @ x
            gram[rows, columns] = block
            gram[columns, rows] = block.T
        gram[rows, size:] = x.T @ cross_TNR[:, :, r]
        gram[size:, rows] = gram[rows, size:].T
    gram[size:, size:] = torch.diag(weight.sum(dim=0))
    left = target - compose(factors, x)
    right = [x.T @ torch.einsum("tn,tnd->td", cross_TNR[:, :, r], left) for r in range(rank)]
    change = solve_ridge(gram, torch.cat([*right, torch.einsum("tn,tnd->nd", weight, left)]), ridge=ridge)
    b_RdD = factors.b_RdD + change[:size].reshape(rank, width, -1).transpose(1, 2)
    return Factors(factors.a_NRD, b_RdD, factors.bias_Nd + change[size:])


def _sweep_a(factors: Factors, x: Tensor, target: Tensor, weight: Tensor, *, ridge: float) -> Factors:
    heads, rank, width = factors.a_NRD.shape
    b_TRd = torch.einsum("tj,rdj->trd", x, factors.b_RdD)
    left_TNd = target - compose(factors, x)
    inner_TRR = torch.einsum("trd,tsd->trs", b_TRd, b_TRd)
    changes = []
    for head in range(heads):
        heavy = x * weight[:, head, None]
        gram = x.new_zeros((rank * width, rank * width))
        for r, s in itertools.combinations_with_replacement(range(rank), 2):
            block = (heavy * inner_TRR[:, r, s, None]).T @ x
            gram[r * width : (r + 1) * width, s * width : (s + 1) * width] = block
            gram[s * width : (s + 1) * width, r * width : (r + 1) * width] = block
        pull_TR = torch.einsum("trd,td->tr", b_TRd, left_TNd[:, head])
        right = (heavy.T @ pull_TR).T.reshape(-1, 1)
        changes.append(solve_ridge(gram, right, ridge=ridge).reshape(rank, width))
    return Factors(factors.a_NRD + torch.stack(changes), factors.b_RdD, factors.bias_Nd)


def _scaled(w_D: Tensor, x_TD: Tensor) -> Tensor:
    x = x_TD.double()
    return x * (x @ w_D.double())[:, None]


def _fit_scaled(
    w_D: Tensor, x_TD: Tensor, target_TNd: Tensor, *, start_NdD: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    """Best linear maps from c(x) x to the centred targets, and the mean of c(x) x."""
    features = _scaled(w_D, x_TD)
    heads, width = target_TNd.shape[1:]
    start = start_NdD.double().flatten(0, 1)
    sums = RidgeSums(features.shape[1], heads * width, device=features.device)
    sums.add(features, target_TNd.double().flatten(1) - features @ start.T)
    change, _ = sums.solve(ridge=ridge)
    return (start + change).reshape(heads, width, -1), sums.input_mean
