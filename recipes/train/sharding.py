"""Where the weights of a model in training lie: whole in one process, or shared out over ranks.

Place in the path: model -> **sharding** -> loop, optimizer. What is large is shared out (`sharded`): stacks of experts,
the embedding, the head.

Example:
    sharding = Whole(model)
    optimizer = optimizer_of(sharding.weights, settings)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, nn

from recipes.model.donor import Donor
from recipes.model.moe import MixtureOfExperts
from recipes.model.transformer import Student
from recipes.train.optimizer import gradient_norm

_T = TypeVar("_T")


class Whole:
    """All of a model in this process."""

    def __init__(self, model: Student | Donor) -> None:
        self.model = model
        self.weights: Mapping[str, Tensor] = dict(model.named_parameters())  # what the optimizer moves

    def train(self, is_trained: Callable[[str], bool]) -> None:
        """Choose the weights that get gradients."""
        for name, weight in self.model.named_parameters():
            weight.requires_grad_(is_trained(name))

    def complete_gradients(self) -> None:
        """Make each weight's gradient that of the global batch."""

    def norm(self) -> Tensor:
        """Of all gradients together, where they lie; NaN or infinite if any of them is."""
        return gradient_norm(self.weights)

    def places(self, optimizer: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]] | None:
        """Where a saved state is to be read into, weights and optimizer; None: anew, and whole."""
        return None

    def stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that lie as the weights do, named `<weight>` or `<weight>/<part>`, as a state file wants them."""
        return dict(tensors)

    def local(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The way back."""
        return dict(tensors)

    def with_head(self, function: Callable[..., _T], hidden_NH: Tensor, *rest: Tensor, **options: int) -> _T:
        """`function(hidden, head, *rest)`; the head's gradient is one of those that `complete_gradients` completes."""
        return function(hidden_NH, self.model.head_weight, *rest, **options)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Every weight is whole inside: for measuring, and for what is published."""
        yield


def shared_names(model: Student) -> frozenset[str]:
    """The weights that are shared out among ranks: stacks of experts, embedding, head."""
    large = {id(weight) for layer in model.layers for weight in experts_of(layer.mlp)}
    large |= {id(model.model.embed_tokens.weight), id(model.lm_head.weight)}
    return frozenset(name for name, weight in model.named_parameters() if id(weight) in large)


def experts_of(mlp: nn.Module) -> list[nn.Parameter]:
    """The stacks of experts of a layer's feed-forward part; none if it is dense."""
    return list(mlp.experts.parameters()) if isinstance(mlp, MixtureOfExperts) else []
