"""A model shared out over ranks by FSDP2: large weights along their first dimension, all else whole on every rank.

Place in the path: sharding -> **here**, where several processes train one model.

Invariants: each rank holds whole matrices of a stack, so NorMuon needs no other rank; replicated weights see equal
gradients and stay equal; gradients are sums, as the objective is already divided by the global batch.

Source:  https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from recipes.model.donor import Donor
from recipes.model.transformer import Student
from recipes.ops.roots import square_root
from recipes.train.optimizer import gradient_norm
from recipes.train.ranks import Ranks
from recipes.train.sharding import Whole, experts_of, shared_names
from vpstore.errors import RecipeRefused

_T = TypeVar("_T")
_AHEAD = 2  # layers that are put together before they are needed; each is 0.3 GB at full shape


class Sharded(Whole):
    """A rank's part of a model."""

    def __init__(self, model: Student, ranks: Ranks) -> None:
        self.ranks = ranks
        self.mesh = init_device_mesh(model.head_weight.device.type, (ranks.world,))
        names = shared_names(model)
        require_divides(model, names, ranks.world)
        _share_out(model, self.mesh, names)
        super().__init__(model)
        self.shared = {name: weight for name, weight in model.named_parameters() if isinstance(weight, DTensor)}
        assert self.shared.keys() == names
        self.weights = {
            name: weight.to_local().detach() if isinstance(weight, DTensor) else weight
            for name, weight in model.named_parameters()
        }
        self._trained = frozenset(self.shared)

    def train(self, is_trained: Callable[[str], bool]) -> None:
        """As of the base; a shared weight always gets a gradient, which is dropped where it is not wanted."""
        for name, weight in self.model.named_parameters():
            if name not in self.shared:
                weight.requires_grad_(is_trained(name))
        self._trained = frozenset(filter(is_trained, self.shared))

    def complete_gradients(self) -> None:
        """As of the base: shared weights have theirs from the backward pass, the others are added up here."""
        whole = [w.grad for name, w in self.weights.items() if name not in self.shared and w.grad is not None]
        self.ranks.add_in_place(whole)
        for name, weight in self.shared.items():
            gradient = weight.grad if name in self._trained else None
            self.weights[name].grad = None if gradient is None else cast(DTensor, gradient).to_local()

    def norm(self) -> Tensor:
        """As of the base."""
        parts: list[dict[str, Tensor]] = [{}, {}]
        for name, weight in self.weights.items():
            parts[name in self.shared][name] = weight
        whole, shared = (gradient_norm(part).square() for part in parts)
        device = self.model.head_weight.device
        return square_root(whole.to(device) + self.ranks.added(shared.to(device)))

    def places(self, optimizer: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]] | None:
        """As of the base: this rank's parts, where they lie."""
        return {"weights": self.model.state_dict(), "optimizer": self.stored(optimizer)}

    def stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As of the base."""
        return {
            name: DTensor.from_local(x, self.mesh, [Shard(0)]) if self._is_part(name, x) else x
            for name, x in tensors.items()
        }

    def local(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As of the base."""
        return {name: x.to_local() if isinstance(x, DTensor) else x for name, x in tensors.items()}

    def with_head(self, function: Callable[..., _T], hidden_NH: Tensor, *rest: Tensor, **options: int) -> _T:
        """As of the base: a forward pass of the head, around which its weight is put together and shared out again."""
        found: _T = self.model.lm_head.through(function, hidden_NH, *rest, **options)  # type: ignore[operator]
        return found

    @contextmanager
    def whole(self) -> Iterator[None]:
        """As of the base; every rank must come here, and what is changed inside is lost with its end."""
        modules = {name: m for name, m in self.model.named_modules() if isinstance(m, FSDPModule)}
        for module in modules.values():
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for name, module in modules.items():
                module.set_reshard_after_forward(bool(name), recurse=False)  # the model itself has no name
                module.reshard()

    def _is_part(self, name: str, x: Tensor) -> bool:
        return name.partition("/")[0] in self.shared and not isinstance(x, DTensor)


def shared_out(model: Student | Donor, ranks: Ranks) -> Sharded:
    """The model, its large weights shared out among several ranks.

    Raises:  RecipeRefused: a model that cannot be, or not among so many.
    """
    if not isinstance(model, Student):
        raise RecipeRefused("this model trains in one process", found=f"{ranks.world} ranks", next_step="set ranks = 1")
    return Sharded(model, ranks)


def require_divides(model: Student, names: frozenset[str], ranks: int) -> None:
    """Refuse a number of ranks by which a weight that is to be shared out does not divide.

    Raises:  RecipeRefused: naming the weight.
    """
    for name, weight in model.named_parameters():
        if name in names and weight.shape[0] % ranks:
            raise RecipeRefused(
                "a weight cannot be shared out among so many ranks",
                where=name,
                expected=f"a number of ranks that divides {weight.shape[0]}",
                found=f"{ranks} ranks",
                next_step="set runtime.ranks to one that divides it",
            )


def _share_out(model: Student, mesh: DeviceMesh, names: frozenset[str]) -> None:
    """Layers with experts, embedding and head each by themselves, so that one is whole at a time."""
    whole = {weight for name, weight in model.named_parameters() if name not in names}
    parts = [layer for layer in model.layers if experts_of(layer.mlp)]
    for module in (*parts, model.model.embed_tokens, model.lm_head, model):
        fully_shard(module, mesh=mesh, ignored_params=whole)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # what gloo knows, and plain sums are what is wanted
    _prefetch(parts)
    head = model.lm_head

    def through(function: Callable[..., _T], hidden_NH: Tensor, *rest: Tensor, **options: int) -> _T:
        return function(hidden_NH, head.weight, *rest, **options)

    head.through = through  # type: ignore[assignment]
    for name in ("hidden_of", "hidden_and_state"):  # in training, and in measuring
        register_fsdp_forward_method(model, name)
    register_fsdp_forward_method(head, "through")


def _prefetch(parts: Sequence[nn.Module]) -> None:
    """Put the next layers together while one computes; a host that launches kernel by kernel runs not far ahead."""
    for number, part in enumerate(parts):
        behind, before = parts[number + 1 : number + 1 + _AHEAD], parts[max(0, number - _AHEAD) : number]
        cast(FSDPModule, part).set_modules_to_forward_prefetch(cast(list[FSDPModule], behind))
        cast(FSDPModule, part).set_modules_to_backward_prefetch(cast(list[FSDPModule], before[::-1]))
