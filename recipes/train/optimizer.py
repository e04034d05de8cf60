"""NorMuon for the matrices, AdamW for everything else; all state is plain tensors.

Place in the path: gradients -> **optimizer** -> weights. What a weight is, and so how it is trained, follows from its
name: `kind_of`. A stack of experts [E, rows, columns] is a batch of E matrices.

Legend: M matrices of a batch, R rows, K columns.

Invariants: elementwise work and batched products in a fixed order, so that equal gradients give equal bits; the state
of a weight is tensors of float32 named `momentum` and `second_moment` [.., R, 1] (matrices) or `mean` and `square`
(the others), and the number of steps the weight was trained; a weight without a gradient is left alone.

Example:
    optimizer = Optimizer({name: weight for name, weight in model.named_parameters()}, settings)
    optimizer.step(factor=0.5)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from recipes.names import EMBEDDING, HEAD, LOG_FREQ
from recipes.ops.roots import square_root
from recipes.params.training import OptimizerParams
from vpstore.errors import RecipeRefused

Kind = Literal["matrix", "embedding", "head", "vector", "frequency", "residual"]
KINDS: tuple[Kind, ...] = ("matrix", "embedding", "head", "vector", "frequency", "residual")

# Polar Express, Amsel et al. 2025, arXiv:2505.16932: five odd polynomials a x + b x^3 + c x^5, in the published
# setting for a safety factor of 2%, which is why the input is divided by 1.02 times its norm.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
_SAFETY, _NORM_EPSILON, _ROW_EPSILON = 1.02, 1e-6, 1e-10
# Elements that are stacked into one batch of equal matrices: on a CPU what stays in the cache, on a GPU what keeps it
# busy; and elements of an AdamW pass that stay in a CPU's cache.
_BATCH_ELEMENTS = {"cpu": 1 << 22}
BATCH_ELEMENTS_ON_GPU = 1 << 27
_PASS_ELEMENTS = 1 << 18

State = dict[str, Tensor]


def kind_of(name: str, tensor: Tensor) -> Kind:
    """How the weight of this name is trained."""
    if name in (EMBEDDING, HEAD):
        return "embedding" if name == EMBEDDING else "head"
    if name == LOG_FREQ:
        return "frequency"
    if name.endswith("value_residual"):
        return "residual"
    is_bias = name.endswith("bias")  # a stack of biases has two dimensions and is still no matrix
    return "matrix" if tensor.ndim >= 2 and not is_bias else "vector"


class Stepper(Protocol):
    """What a trainer wants of an optimizer."""

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """All that it moves, by name."""

    def rates(self, factor: float) -> Mapping[str, float]:
        """The learning rate of each group."""

    def prepare(self, factor: float) -> None:
        """Do what a step can do before the gradients' norm is known."""

    def step(self, factor: float) -> None:
        """One update of every weight that has a gradient."""

    def release(self) -> None:
        """Let go of what only steps need; the state stays."""

    def saved(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """All state as named tensors, `<weight>/<part>`, and the steps of each weight."""

    def load(self, tensors: Mapping[str, Tensor], steps: Mapping[str, int]) -> None:
        """Take up what `saved` gave."""


class Optimizer:
    """Both optimizers over named weights; `factor` of a step scales every group's peak rate."""

    def __init__(self, weights: Mapping[str, Tensor], settings: OptimizerParams) -> None:
        self.settings = settings
        self.weights = dict(sorted(weights.items()))
        self.kinds = {name: kind_of(name, weight) for name, weight in self.weights.items()}
        self.steps = dict.fromkeys(self.weights, 0)
        self.state: dict[str, State] = {
            name: _fresh_state(self.kinds[name], weight) for name, weight in self.weights.items()
        }

    def saved(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """All state as named tensors, `<weight>/<part>`, and the steps of each weight."""
        tensors = {f"{name}/{part}": t for name, state in self.state.items() for part, t in state.items()}
        return tensors, dict(self.steps)

    def load(self, tensors: Mapping[str, Tensor], steps: Mapping[str, int]) -> None:
        """Take up what `saved` gave.

        Raises:  RecipeRefused: state of other weights.
        """
        own, _ = self.saved()
        if tensors.keys() != own.keys() or steps.keys() != self.steps.keys():
            different = sorted(tensors.keys() ^ own.keys()) or sorted(steps.keys() ^ self.steps.keys())
            raise RecipeRefused(
                "a saved optimizer belongs to another model",
                where=", ".join(different[:4]),
                expected=f"{len(own)} tensors",
                found=f"{len(tensors)} tensors",
                next_step="delete the training state to start from the beginning",
            )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self.steps = dict(steps)

    def rates(self, factor: float) -> dict[str, float]:
        """The learning rate of each group."""
        s = self.settings
        peaks: dict[str, float] = {
            "matrix": s.matrix_rate,
            "embedding": s.embedding_rate,
            "head": s.head_rate,
            "vector": s.vector_rate,
            "frequency": s.frequency_rate,
            "residual": s.residual_rate,
        }
        return {kind: peak * factor for kind, peak in peaks.items()}

    def prepare(self, factor: float) -> None:
        """Do what a step can do before the gradients' norm is known; here nothing."""

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update of every weight that has a gradient."""
        rates = self.rates(factor)
        names = [name for name, weight in self.weights.items() if weight.grad is not None]
        for name in names:
            self.steps[name] += 1
        for batch in self.batches([name for name in names if self.kinds[name] == "matrix"]):
            self._normuon(batch, rates["matrix"])
        for kind in KINDS[1:]:
            for name in names:
                if self.kinds[name] == kind:
                    self._adamw(name, rates[kind])

    def release(self) -> None:
        """Let go of what only steps need; here nothing."""

    def batches(self, names: Sequence[str]) -> Iterator[list[str]]:
        """Matrices of equal shape together, as long as they stay small."""
        alike: dict[tuple[int, ...], list[str]] = {}
        for name in names:
            alike.setdefault(tuple(self.weights[name].shape), []).append(name)
        for shape, group in sorted(alike.items()):
            device = self.weights[group[0]].device.type
            size = max(1, _BATCH_ELEMENTS.get(device, BATCH_ELEMENTS_ON_GPU) // math.prod(shape))
            for start in range(0, len(group), size):
                yield group[start : start + size]

    def _normuon(self, names: list[str], rate: float) -> None:
        weights, updates = [self.weights[name] for name in names], self.directions(names)
        shape = weights[0].shape
        torch._foreach_mul_(weights, 1.0 - rate * self.settings.matrix_decay)
        torch._foreach_add_(weights, list(updates), alpha=-rate * math.sqrt(max(1.0, shape[-2] / shape[-1])))

    @staticmethod
    def normalise(update_MRK: Tensor, second_MR1: Tensor, *, beta: float) -> Tensor:
        """`row_normalised`, as this optimizer runs it."""
        return row_normalised(update_MRK, second_MR1, beta=beta)

    def directions(self, names: list[str]) -> Tensor:
        """Where NorMuon moves a batch of equal matrices, stacked; updates their state."""
        s = self.settings
        gradients = [gradient_of(self.weights[name]) for name in names]
        momenta = [self.state[name]["momentum"] for name in names]
        torch._foreach_lerp_(momenta, gradients, 1.0 - s.momentum)
        shape = gradients[0].shape
        update_MRK = torch.stack(torch._foreach_lerp(gradients, momenta, s.momentum)).view(-1, *shape[-2:])
        update_MRK = orthogonal(update_MRK, dtype=getattr(torch, s.orthogonal_dtype))
        second_MR1 = torch.stack([self.state[name]["second_moment"] for name in names]).view(-1, shape[-2], 1)
        update_MRK = self.normalise(update_MRK, second_MR1, beta=s.normuon_beta)
        seconds = list(second_MR1.view(-1, *shape[:-1], 1))
        torch._foreach_copy_([self.state[name]["second_moment"] for name in names], seconds)
        return update_MRK.view(-1, *shape)

    def _adamw(self, name: str, rate: float) -> None:
        s, steps = self.settings, self.steps[name]
        decay = s.table_decay if self.kinds[name] in ("embedding", "head") else 0.0
        root = math.sqrt(1.0 - s.adam_beta2**steps)
        size = rate / (1.0 - s.adam_beta1**steps)
        state = self.state[name]
        flat = (self.weights[name], gradient_of(self.weights[name]), state["mean"], state["square"])
        # Piece by piece: an embedding of 50 MB then crosses memory once and not once an operation.
        for weight, gradient, mean, square in zip(*(_pieces(tensor) for tensor in flat), strict=True):
            mean.lerp_(gradient, 1.0 - s.adam_beta1)
            square.mul_(s.adam_beta2).addcmul_(gradient, gradient, value=1.0 - s.adam_beta2)
            divisor = square_root(square).div_(root).add_(s.adam_epsilon)
            if decay:
                weight.mul_(1.0 - rate * decay)
            weight.addcdiv_(mean, divisor, value=-size)


def _fresh_state(kind: Kind, weight: Tensor) -> State:
    if kind == "matrix":
        rows = (*weight.shape[:-1], 1)
        return {
            "momentum": torch.zeros_like(weight, requires_grad=False),
            "second_moment": weight.new_zeros(rows, requires_grad=False),
        }
    return {key: torch.zeros_like(weight, requires_grad=False) for key in ("mean", "square")}


def gradient_of(weight: Tensor) -> Tensor:
    """The gradient of a weight that has one."""
    if weight.grad is None:
        raise RuntimeError("a weight without a gradient has no update")  # step() only names those that have one
    return weight.grad


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor.detach().view(-1), _PASS_ELEMENTS)


def orthogonal(matrix_MRK: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The nearly orthogonal factor of each matrix: singular values pushed towards 1, directions kept.

    Args:    dtype: of the products; float32 is what equal bits are promised for.
    Returns: float32, same shape; a zero matrix stays zero.
    Source:  Amsel et al. 2025, arXiv:2505.16932 (Polar Express, degree 5, five steps).
    """
    is_tall = matrix_MRK.shape[-2] > matrix_MRK.shape[-1]
    x: Tensor = (matrix_MRK.mT if is_tall else matrix_MRK).to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * _SAFETY + _NORM_EPSILON)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).float()


def row_normalised(update_MRK: Tensor, second_MR1: Tensor, *, beta: float) -> Tensor:
    """Each row divided by its running root mean square, at the old Frobenius norm; updates `second_MR1` in place.

    Source:  Li et al. 2025, arXiv:2510.05491 (NorMuon).
    """
    norm = update_MRK.norm(dim=(-2, -1), keepdim=True)
    second_MR1.lerp_(update_MRK.square().mean(-1, keepdim=True), 1.0 - beta)
    scaled = update_MRK / (square_root(second_MR1) + _ROW_EPSILON)
    result: Tensor = scaled * (norm / (scaled.norm(dim=(-2, -1), keepdim=True) + _ROW_EPSILON))
    return result


def _gradients(weights: Mapping[str, Tensor]) -> list[Tensor]:
    return [weight.grad for _, weight in sorted(weights.items()) if weight.grad is not None]


@torch.no_grad()
def gradient_norm(weights: Mapping[str, Tensor]) -> Tensor:
    """The common norm of all gradients, where they lie; NaN or infinite if any of them is; 0 if there are none."""
    found = _gradients(weights)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(found))) if found else torch.zeros(())


@torch.no_grad()
def clip_gradients(weights: Mapping[str, Tensor], norm: float, limit: float) -> None:
    """Scale all gradients down so that their common norm, which is `norm`, is at most `limit`."""
    if math.isfinite(norm) and norm > limit:
        torch._foreach_mul_(_gradients(weights), limit / norm)
