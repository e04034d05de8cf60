"""The optimizer on a GPU: the same steps, captured once as a CUDA graph, AdamW by torch's fused kernel.

Place in the path: gradients -> **optimizer_gpu** -> weights, where the weights lie on a GPU. A step is a few hundred
small kernels; a host that launches them one by one is slower than the card.

Invariants: state and its names are those of `optimizer`, so a run is saved and resumed alike; rates and counters are
numbers on the device, written before each replay; gradients that lie elsewhere than at the capture are another
capture; square roots are the GPU's own, so bits are those of one kind of GPU.

Example:
    optimizer = optimizer_of(dict(model.named_parameters()), settings)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from recipes.model.compiled import compiled
from recipes.params.training import OptimizerParams
from recipes.train.capture import recording
from recipes.train.optimizer import KINDS, Kind, Optimizer, gradient_of, row_normalised


def optimizer_of(weights: Mapping[str, Tensor], settings: OptimizerParams) -> Optimizer:
    """The optimizer for where the weights lie."""
    is_on_gpu = any(weight.is_cuda for weight in weights.values())
    return GpuOptimizer(weights, settings) if is_on_gpu else Optimizer(weights, settings)


@cache
def _compiled_normalise() -> Callable[..., Tensor]:
    return compiled(row_normalised)


class GpuOptimizer(Optimizer):
    """As its base, replayed."""

    def __init__(self, weights: Mapping[str, Tensor], settings: OptimizerParams) -> None:
        super().__init__(weights, settings)
        device = next(iter(weights.values())).device
        self._rates = torch.zeros(len(KINDS), device=device)
        self._done = {name: torch.zeros((), device=device) for name, kind in self.kinds.items() if kind != "matrix"}
        self._places: tuple[tuple[str, int], ...] = ()  # each gradient's weight and address
        self._key: tuple[tuple[str, int], ...] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def load(self, tensors: Mapping[str, Tensor], steps: Mapping[str, int]) -> None:
        """As of the base."""
        super().load(tensors, steps)
        for name, done in self._done.items():
            done.fill_(steps[name])

    def prepare(self, factor: float) -> None:
        """Send the rates, and look where the gradients lie."""
        rates = self.rates(factor)
        self._rates.copy_(torch.tensor([rates[kind] for kind in KINDS]).pin_memory(), non_blocking=True)
        having = [(name, weight.grad) for name, weight in self.weights.items() if weight.grad is not None]
        self._places = tuple((name, gradient.data_ptr()) for name, gradient in having)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update of every weight that has a gradient; `prepare` came before, with the same factor."""
        names = [name for name, _ in self._places]
        for name in names:
            self.steps[name] += 1
        if self._places != self._key:  # as it stands, which makes ready what a capture wants ready
            self._key, self._graph = self._places, None
            self._update(names)
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with recording(self._graph):
                self._update(names)
        self._graph.replay()

    def release(self) -> None:
        """Let go of the captured step."""
        self._key = self._graph = None

    @staticmethod
    def normalise(update_MRK: Tensor, second_MR1: Tensor, *, beta: float) -> Tensor:
        """As of the base, in two passes over memory instead of ten."""
        return _compiled_normalise()(update_MRK, second_MR1, beta=beta)

    def _update(self, names: Sequence[str]) -> None:
        rates = dict(zip(KINDS, self._rates.unbind(), strict=True))
        decay = 1.0 - rates["matrix"] * self.settings.matrix_decay
        for batch in self.batches([name for name in names if self.kinds[name] == "matrix"]):
            weights, updates = [self.weights[name] for name in batch], self.directions(batch)
            shape = weights[0].shape
            updates.mul_(rates["matrix"] * -math.sqrt(max(1.0, shape[-2] / shape[-1])))
            torch._foreach_mul_(weights, decay)
            torch._foreach_add_(weights, list(updates))
        for kind in KINDS[1:]:
            alike = [name for name in names if self.kinds[name] == kind]
            if alike:
                self._fused(alike, kind, rates[kind])

    def _fused(self, names: Sequence[str], kind: Kind, rate: Tensor) -> None:
        s = self.settings
        adamw(
            [self.weights[name].detach() for name in names],
            [gradient_of(self.weights[name]) for name in names],
            [self.state[name]["mean"] for name in names],
            [self.state[name]["square"] for name in names],
            [],
            [self._done[name] for name in names],
            fused=True,
            amsgrad=False,
            beta1=s.adam_beta1,
            beta2=s.adam_beta2,
            lr=rate,
            weight_decay=s.table_decay if kind in ("embedding", "head") else 0.0,
            eps=s.adam_epsilon,
            maximize=False,
        )
