"""The donor's gated feed-forward, fitted into the student's ungated one; the mathematics is in `recipes.ops.ffn`.

Place in the path: recipe -> **model**; one layer of `recipes.model.convert_walk`. In order: spread of gate and up on
the student's stream; greedy choice of the donor's neurons; pairs of squared-ReLU rows; output projection and bias by
least squares; then local gradient steps on the input rows, judged with the output fitted anew.

Invariants: every fit uses what is already rounded to its stored dtype; the steps are kept only if the fit is better
with them on the rows they were made on; batches come in an order that only the seed decides.

Shapes: T tokens of all rows, H hidden, N neurons of the donor, F width of the student.

Example:
    >>> tensors, figures = fit_ffn(donor_layer.mlp, Examples.of(inputs_TH, targets_TH, limit=30.0), setting)
"""

# ruff: noqa: N815 - fields carry their shapes as capital suffixes

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.model.donor import DonorMlp
from recipes.ops import ffn
from recipes.ops.linear import RidgeSums, token_weights
from recipes.ops.roots import square_root
from vpstore.errors import ShapeMismatch

_STORED = torch.bfloat16
_BETAS = (0.9, 0.99)
_TOKENS = 4096  # tokens whose features are in memory at a time


@dataclass(frozen=True)
class FfnSetting:
    """The target's width, and the knobs of the fit."""

    width: int
    ridge: float
    pair_scale: float
    steps: int
    step_tokens: int
    learning_rate: float
    seed: int


class Examples(NamedTuple):
    """What a feed-forward is fitted to."""

    inputs_TH: Tensor  # the student's normalised stream
    targets_TH: Tensor  # what should be added to the stream
    weight_T: Tensor  # how much each token counts

    @classmethod
    def of(cls, inputs_TH: Tensor, targets_TH: Tensor, *, limit: float) -> Examples:
        """Tokens weighted so that none owns the fit; `limit` as in `recipes.ops.linear.token_weights`."""
        return cls(inputs_TH, targets_TH, token_weights(targets_TH, limit=limit))

    def parts(self) -> Iterator[Examples]:
        """Some tokens at a time."""
        for start in range(0, len(self.inputs_TH), _TOKENS):
            yield Examples(*(values[start : start + _TOKENS] for values in self))


def fit_ffn(mlp: DonorMlp, examples: Examples, setting: FfnSetting) -> tuple[dict[str, Tensor], dict[str, float]]:
    """All feed-forward tensors of one student layer, by their names below `mlp.`, in their stored dtypes.

    Returns: the tensors, and figures of the fit on these tokens.
    Raises:  ShapeMismatch: an odd width (pairs need an even one), or more pairs than the donor has neurons.
    """
    pairs = setting.width // 2
    if setting.width % 2 or pairs > len(mlp.gate_proj.weight):
        raise ShapeMismatch(
            "the student's feed-forward cannot hold pairs",
            expected=f"an even width of at most {2 * len(mlp.gate_proj.weight)}",
            found=str(setting.width),
        )
    with torch.no_grad():
        chosen, scale_N = _chosen(mlp, examples, setting)
        gate, up = mlp.gate_proj.weight[chosen], mlp.up_proj.weight[chosen]
        rows_FH = ffn.pair_rows(gate, up, scale_N[chosen]).to(_STORED)
        first = _with_output(rows_FH, gate.new_zeros(setting.width), examples, setting)
    best, figures = first[0], {"r2_pairs": first[1], "r2": first[1]}
    if setting.steps:
        moved = _stepped(best, examples, setting)
        with torch.no_grad():
            again = _with_output(*moved, examples, setting)
        if again[1] > first[1]:
            best, figures["r2"] = again
    return best, figures


def pool_ffn(mlp: DonorMlp, *, width: int) -> dict[str, Tensor]:
    """The baseline: the heaviest `up` rows under a squared ReLU, their output columns copied, no gate."""
    up, down = mlp.up_proj.weight, mlp.down_proj.weight
    chosen = ffn.select_by_norm(up, down, width)
    return {
        "fc1.weight": up[chosen].to(_STORED),
        "fc1.bias": up.new_zeros(width, dtype=_STORED),
        "fc2.weight": down[:, chosen].to(_STORED),
        "fc2.bias": up.new_zeros(len(down), dtype=_STORED),
    }


def features(rows_FH: Tensor, bias_F: Tensor, inputs_TH: Tensor) -> Tensor:
    """relu(W1 x + b1)^2."""
    return ffn.relu_squared(F.linear(inputs_TH, rows_FH.to(inputs_TH.dtype), bias_F.to(inputs_TH.dtype)))


def _chosen(mlp: DonorMlp, examples: Examples, setting: FfnSetting) -> tuple[list[int], Tensor]:
    """The donor's neurons, in the order of the greedy choice, and the pair scales of all neurons."""
    gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
    spread = RidgeSums(gate.shape[1], 0, device=gate.device)
    spread.add(examples.inputs_TH, examples.inputs_TH[:, :0])
    covariance_HH = spread.covariance()[0]
    energy = [torch.einsum("nh,hk,nk->n", w.double(), covariance_HH, w.double()).clamp(min=0) for w in (gate, up)]
    std = [square_root(energy_N) for energy_N in energy]
    scale_N = ffn.pair_scales(*std, share=setting.pair_scale).to(gate.dtype)
    sums = RidgeSums(len(gate), gate.shape[1], device=gate.device)
    for x_TH, y_TH, weight_T in examples.parts():
        sums.add(ffn.pair_features(F.linear(x_TH, gate), F.linear(x_TH, up), scale_N), y_TH, weight_T)
    return ffn.select_greedily(*sums.covariance(), setting.width // 2), scale_N


def _with_output(
    rows_FH: Tensor, bias_F: Tensor, examples: Examples, setting: FfnSetting
) -> tuple[dict[str, Tensor], float]:
    """These input rows with the output fitted to them, and how well that does."""
    rows_FH, bias_F = rows_FH.to(_STORED), bias_F.to(_STORED)
    sums = RidgeSums(setting.width, rows_FH.shape[1], device=rows_FH.device)
    for x_TH, y_TH, weight_T in examples.parts():
        sums.add(features(rows_FH, bias_F, x_TH), y_TH, weight_T)
    weight, bias = (value.to(_STORED) for value in sums.solve(ridge=setting.ridge))
    tensors = {"fc1.weight": rows_FH, "fc1.bias": bias_F, "fc2.weight": weight, "fc2.bias": bias}
    return tensors, sums.explained(weight, bias)


def _stepped(start: dict[str, Tensor], examples: Examples, setting: FfnSetting) -> tuple[Tensor, Tensor]:
    """Input rows and biases after some Adam steps on the squared error of all four tensors."""
    generator = torch.Generator().manual_seed(setting.seed)
    moving = [value.float().clone().requires_grad_() for value in start.values()]
    moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value in moving]
    inputs_TH, targets_TH, weight_T = examples
    energy = float(targets_TH.square().mean()) or 1.0
    for step in range(setting.steps):
        rate = setting.learning_rate * (1 - step / setting.steps)
        batch_T = torch.randint(len(inputs_TH), (setting.step_tokens,), generator=generator).to(inputs_TH.device)
        got = F.linear(features(moving[0], moving[1], inputs_TH[batch_T]), moving[2], moving[3])
        error_T = (got - targets_TH[batch_T]).square().mean(1)
        loss = (error_T * weight_T[batch_T].float()).mean() / energy
        gradients = torch.autograd.grad(loss, moving)
        with torch.no_grad():
            for value, gradient, moment in zip(moving, gradients, moments, strict=True):
                _adam(value, gradient, moment, rate=rate, step=step)
    return moving[0].detach(), moving[1].detach()


def _adam(value: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], *, rate: float, step: int) -> None:
    """One step, in place (Kingma and Ba 2015). torch.optim would bring its compiler along, seconds of import."""
    first, second = moments
    first.lerp_(gradient, 1 - _BETAS[0])
    second.lerp_(gradient.square(), 1 - _BETAS[1])
    size = square_root(second / (1 - _BETAS[1] ** (step + 1))).add_(1e-8)
    value.sub_(first / (1 - _BETAS[0] ** (step + 1)) / size * rate)
