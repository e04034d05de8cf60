"""Least squares and symmetric matrices in float64, the small change of closed-form surgery.

Place in the path: below `heads`, `ffn` and the fits of whole layers. Sums are streamed: a fit holds one matrix of
moments, however many tokens there are.

Legend: T tokens, I inputs of a fit, O outputs.

Invariants: biases are not penalised; eigen- and singular vectors have a ruled sign (the largest component, the first of
equal ones, is positive), so that results do not hang on a library's mood.

Example:
    sums = RidgeSums(64, 16)
    for x_TI, y_TO in batches:
        sums.add(x_TI, y_TO)
    weight_OI, bias_O = sums.solve(ridge=1e-4)
"""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.ops.roots import square_root
from vpstore.errors import ShapeMismatch


class RidgeSums:
    """Moments of inputs and outputs, for y ~ W x + b."""

    def __init__(self, inputs: int, outputs: int, *, device: torch.device | str = "cpu") -> None:
        """Start with nothing added."""
        self.count = 0.0
        self.sum_I = torch.zeros(inputs, dtype=torch.float64, device=device)
        self.sum_O = torch.zeros(outputs, dtype=torch.float64, device=device)
        self.gram_II = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.cross_IO = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)
        self.energy_O = torch.zeros(outputs, dtype=torch.float64, device=device)

    def add(self, x_TI: Tensor, y_TO: Tensor, weight_T: Tensor | None = None) -> None:
        """Take in some tokens.

        Args:    weight_T: how much each token counts; None: 1.
        Raises:  ShapeMismatch: other widths than announced, or unequal numbers of tokens.
        """
        if x_TI.shape[1:] != self.sum_I.shape or y_TO.shape[1:] != self.sum_O.shape or len(x_TI) != len(y_TO):
            raise ShapeMismatch(
                "inputs and outputs do not fit the fit",
                expected=f"[T, {len(self.sum_I)}] and [T, {len(self.sum_O)}]",
                found=f"{list(x_TI.shape)} and {list(y_TO.shape)}",
            )
        x, y = x_TI.double(), y_TO.double()
        scaled = x if weight_T is None else x * weight_T.double()[:, None]
        weighted = y if weight_T is None else y * weight_T.double()[:, None]
        self.count += float(len(x)) if weight_T is None else float(weight_T.double().sum())
        self.sum_I += scaled.sum(0)
        self.sum_O += weighted.sum(0)
        self.gram_II += scaled.T @ x
        self.cross_IO += scaled.T @ y
        self.energy_O += (weighted * y).sum(0)

    @property
    def input_mean(self) -> Tensor:
        """Mean input, float64 [I]; 0 if nothing was added."""
        return self.sum_I.div(max(self.count, 1e-300))

    @property
    def output_mean(self) -> Tensor:
        """Mean output, float64 [O]; 0 if nothing was added."""
        return self.sum_O.div(max(self.count, 1e-300))

    def covariance(self) -> tuple[Tensor, Tensor]:
        """Centred second moments, a token.

        Returns: float64: of the inputs [I, I], and of inputs with outputs [I, O].
        """
        count = max(self.count, 1e-300)
        gram_II = self.gram_II / count - torch.outer(self.input_mean, self.input_mean)
        return gram_II, self.cross_IO / count - torch.outer(self.input_mean, self.output_mean)

    def solve(self, *, ridge: float) -> tuple[Tensor, Tensor]:
        """Weight and bias of least squared error.

        Args:    ridge: in units of the inputs' mean variance.
        Returns: float64, [O, I] and [O].
        """
        gram_II, cross_IO = self.covariance()
        weight_OI = solve_ridge(gram_II, cross_IO, ridge=ridge).T
        return weight_OI, self.output_mean - weight_OI @ self.input_mean

    def explained(self, weight_OI: Tensor, bias_O: Tensor) -> float:
        """1 - squared error / centred energy of the outputs (R2) of any linear map on what was added.

        Args:    weight_OI, bias_O: [O, I] and [O], of any dtype; the sums are float64.
        Returns: at most 1 up to rounding; negative for a map that is worse than the mean.
        """
        count = max(self.count, 1e-300)
        weight, bias = weight_OI.double(), bias_O.double()
        mapped_OI = weight @ self.gram_II
        error = self.energy_O.sum() - 2 * (weight.T * self.cross_IO).sum() - 2 * (bias * self.sum_O).sum()
        error = error + (mapped_OI * weight).sum() + 2 * (bias * (weight @ self.sum_I)).sum()
        error = error + self.count * bias.square().sum()
        total = self.energy_O.sum() - count * self.output_mean.square().sum()
        return float(1 - error / total.clamp(min=1e-300))


def solve_ridge(gram_II: Tensor, cross_IO: Tensor, *, ridge: float) -> Tensor:
    """(G + ridge * mean(diag G) * 1)^-1 C, by Cholesky factorisation.

    Args:    gram_II: symmetric, [I, I]; cross_IO: [I, O]; ridge: 1e-12 at the least.
    Returns: float64 [I, O]; zero where there is nothing to explain with.
    Raises:  ShapeMismatch: no square matrix, or another number of rows on the right.
    """
    size = len(gram_II)
    if gram_II.shape != (size, size) or len(cross_IO) != size:
        raise ShapeMismatch(
            "a linear system is not square",
            found=f"{list(gram_II.shape)} and {list(cross_IO.shape)}",
            expected="[I, I]",
        )
    wide = gram_II.double()
    level = float(wide.diagonal().mean())
    if level <= 0:
        return torch.zeros_like(cross_IO, dtype=torch.float64)
    # Rounding alone can make a Gram matrix indefinite: the floor of the ridge keeps the factorisation possible.
    shift = torch.eye(size, dtype=torch.float64, device=wide.device) * (max(ridge, 1e-12) * level)
    factor = torch.linalg.cholesky((wide + wide.T) / 2 + shift)
    return torch.cholesky_solve(cross_IO.double(), factor)


def ruled_signs(vectors_NK: Tensor) -> Tensor:
    """Columns with their largest component (of equal ones the first) turned real and positive.

    Args:    vectors_NK: real or complex, [..., N, K].
    Returns: same shape and dtype; a column of zeros stays.
    """
    largest_1K = vectors_NK.abs().argmax(dim=-2, keepdim=True)
    pivot_1K = vectors_NK.gather(-2, largest_1K)
    size_1K = pivot_1K.abs()
    turn_1K = torch.where(size_1K > 0, pivot_1K.conj() / size_1K.clamp(min=1e-300), torch.ones_like(pivot_1K))
    return vectors_NK * turn_1K


def symmetric_root(matrix_NN: Tensor, *, cutoff: float = 1e-12) -> tuple[Tensor, Tensor]:
    """Square root of a positive semidefinite matrix and the root's pseudo-inverse.

    Args:    matrix_NN: symmetric, [..., N, N]. cutoff: eigenvalues below this share of the largest count
             as zero.
    Returns: float64, both [..., N, N].
    """
    values_N, vectors_NN = torch.linalg.eigh(matrix_NN.double())
    is_used_N = values_N > cutoff * values_N[..., -1:].clamp(min=1e-300)
    root_N = square_root(torch.where(is_used_N, values_N, 0.0))
    inverse_N = torch.where(is_used_N, 1 / root_N.clamp(min=1e-300), 0.0)
    return (vectors_NN * root_N[..., None, :]) @ vectors_NN.mT, (vectors_NN * inverse_N[..., None, :]) @ vectors_NN.mT


def hadamard(size: int, *, device: torch.device | str = "cpu") -> Tensor:
    """An orthogonal matrix whose entries all have the same magnitude (Sylvester's construction).

    Returns: float64 [size, size], symmetric.
    Raises:  ShapeMismatch: no power of two.
    """
    if size < 1 or size & (size - 1):
        raise ShapeMismatch("a Hadamard matrix of this size is not built", expected="a power of two", found=str(size))
    matrix = torch.ones(1, 1, dtype=torch.float64, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.div(size**0.5)


def token_weights(y_TO: Tensor, *, limit: float) -> Tensor:
    """Weights that keep a few tokens from owning a fit: 1, and less where a token has more than its share of energy.

    Args:    y_TO: outputs. limit: energy, in units of the median token's, above which a token
             counts as if it had just that much.
    Returns: float64 [T] in (0, 1].
    """
    energy_T = y_TO.double().square().sum(1)
    ceiling = limit * float(energy_T.median().clamp(min=1e-300))
    return torch.clamp(torch.div(ceiling, energy_T.clamp(min=1e-300)), max=1.0)
