"""The embedded donor's optimizers as a trainer wants them: torch's own Muon and AdamW.

Place in the path: gradients -> **donor_optimizer** -> weights, for a model that is trained from nothing; the
students' is `optimizer`.

Invariants: a group's rate is its peak times the schedule's factor; all state is plain tensors, so a run resumes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from recipes.model.donor import Donor
from recipes.params.embedded_donor import Optimizer
from vpstore.errors import RecipeRefused


class DonorOptimizer:
    """Muon over the matrices of the layers; AdamW over embedding, head and gains."""

    def __init__(self, donor: Donor, settings: Optimizer) -> None:
        self.weights: Mapping[str, Tensor] = dict(sorted(donor.named_parameters()))
        matrices = [weight for name, weight in self.weights.items() if weight.ndim == 2 and ".layers." in name]
        tables = [weight for name, weight in self.weights.items() if weight.ndim == 2 and ".layers." not in name]
        gains = [weight for weight in self.weights.values() if weight.ndim == 1]
        groups = [
            {"params": tables, "lr": settings.embedding_rate, "weight_decay": settings.embedding_decay},
            {"params": gains, "lr": settings.gain_rate, "weight_decay": 0.0},
        ]
        muon = torch.optim.Muon(
            matrices,
            lr=settings.matrix_rate,
            weight_decay=settings.matrix_decay,
            momentum=settings.momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        self.steppers = [muon, torch.optim.AdamW(groups, betas=settings.betas, fused=tables[0].is_cuda)]
        self._peaks = {
            "matrix": settings.matrix_rate, "embedding": settings.embedding_rate, "gain": settings.gain_rate,
        }  # fmt: skip

    def rates(self, factor: float) -> dict[str, float]:
        """The learning rate of each group."""
        return {name: peak * factor for name, peak in self._peaks.items()}

    def prepare(self, factor: float) -> None:
        """Set the rates."""
        groups = [group for stepper in self.steppers for group in stepper.param_groups]
        for group, rate in zip(groups, self.rates(factor).values(), strict=True):
            group["lr"] = rate

    def step(self, factor: float) -> None:
        """One update of every weight; `prepare` came before, with the same factor."""
        for stepper in self.steppers:
            stepper.step()

    def release(self) -> None:
        """Nothing is kept between steps but the state."""

    def saved(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """All state as named tensors, `<weight>/<part>`; the steps are among them."""
        names = {id(weight): name for name, weight in self.weights.items()}
        return {
            f"{names[id(weight)]}/{part}": torch.as_tensor(value)
            for stepper in self.steppers
            for weight, state in stepper.state.items()
            for part, value in state.items()
        }, {}

    def load(self, tensors: Mapping[str, Tensor], steps: Mapping[str, int]) -> None:
        """Take up what `saved` gave.

        Raises:  RecipeRefused: state of other weights.
        """
        for stepper in self.steppers:
            owned = {name for name, weight in self.weights.items() if _owns(stepper, weight)}
            for key, tensor in tensors.items():
                name, _, part = key.rpartition("/")
                if name not in self.weights:
                    raise RecipeRefused(
                        "a saved optimizer belongs to another model",
                        where=name,
                        next_step="delete the training state to start from the beginning",
                    )
                if name in owned:
                    weight = self.weights[name]
                    place = weight.device if tensor.ndim or part != "step" or weight.is_cuda else "cpu"
                    stepper.state[weight][part] = tensor.to(place, copy=True)


def _owns(stepper: torch.optim.Optimizer, weight: Tensor) -> bool:
    return any(weight is one for group in stepper.param_groups for one in group["params"])
