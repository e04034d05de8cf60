"""Forward and backward through the body: on a GPU captured once as CUDA graphs and replayed, else as it stands.

Place in the path: micro_batch -> **passes** -> loss -> backward. A layer is some sixty kernels of a few dozen
microseconds; a host that launches them one by one is slower than the card. A replay launches them all at once.

Invariants: replayed kernels are those that were captured, so bits do not depend on which step was captured; the first
micro-batch of a kind runs as it stands, which compiles what is to be captured; gradients of captured weights lie
where they lay at the capture, so they are zeroed and never dropped; another shape, or another choice of trained
weights, is another capture, and the one before is let go.

Legend: B rows, T tokens, H hidden.

Example:
    passes = Passes(model, numerics)
    found = passes(sent)
    (loss_of(found.hidden_BTH) + found.balance).backward()
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recipes.model.donor import Donor
from recipes.model.health import balance_loss
from recipes.model.precision import REFERENCE, Numerics
from recipes.model.routing import Routing
from recipes.model.stream import Stream
from recipes.model.transformer import Student
from recipes.train.capture import recording
from recipes.train.micro_batch import MicroBatch

Kind = tuple[torch.Size, frozenset[str]]


def answers_in(numerics: Numerics) -> Numerics:
    """How answers are sampled between a training's passes: in its dtype where those are fused, else as measured."""
    return Numerics(numerics.dtype, is_grouped=True) if numerics.is_fused else REFERENCE


class Found(NamedTuple):
    """What one forward pass gave."""

    hidden_BTH: Tensor  # after the final norm; carries gradient
    balance: Tensor  # sum of the layers' balance losses; carries gradient
    routing: Mapping[int, Routing]  # by layer number; without gradient


class Passes:
    """The passes of one run."""

    def __init__(self, model: Student | Donor, numerics: Numerics, *, can_capture: bool = True) -> None:
        self.model, self.numerics = model, numerics
        self.can_capture = can_capture and numerics.is_fused  # not what waits for other ranks
        self._trained = frozenset[str]()
        self._seen: Kind | None = None
        self._captured: _Captured | None = None

    def zero_gradients(self) -> None:
        """Begin a step, whose trained weights are known; what a capture writes into stays where it is."""
        self._trained = frozenset(name for name, weight in self.model.named_parameters() if weight.requires_grad)
        if self._captured is None:
            self.model.zero_grad(set_to_none=True)
        else:
            torch._foreach_zero_([weight.grad for weight in self.model.parameters() if weight.grad is not None])

    def release(self) -> None:
        """Let go of gradients and of what a capture keeps: as much as a step takes."""
        self._seen = self._captured = None
        self.model.zero_grad(set_to_none=True)

    def __call__(self, sent: MicroBatch) -> Found:
        """Forward through the body; differentiable."""
        state = Stream.of(
            sent.documents_BT, device=sent.ids_BT.device, collect=True, marks_padding=self.numerics.is_fused
        )
        if not self.can_capture:
            return _found(self.model.hidden_of(sent.ids_BT, state, self.numerics), state)
        kind = (sent.ids_BT.shape, self._trained)
        if kind != self._seen:
            self._seen, self._captured = kind, None
            for weight in self.model.parameters():  # what is trained no more has no gradient, not one of zero
                weight.grad = weight.grad if weight.requires_grad else None
            return _found(self.model.hidden_of(sent.ids_BT, state, self.numerics), state)
        if self._captured is None:
            self._captured = _Captured(self.model, sent.ids_BT, state, self.numerics)
        return self._captured(sent.ids_BT, state)


def _found(hidden_BTH: Tensor, state: Stream) -> Found:
    if not state.routing:
        return Found(hidden_BTH, torch.zeros((), device=hidden_BTH.device), {})
    # Who keeps a step's figures does not keep the pass that they come from.
    routing = {number: Routing(*(x.detach() for x in one)) for number, one in state.routing.items()}
    return Found(hidden_BTH, balance_loss(state.routing), routing)


def _inputs(ids_BT: Tensor, state: Stream) -> list[Tensor]:
    made = [ids_BT, state.positions_BT, state.run_BT, state.kept_BT]
    return [x for x in made if x is not None]  # `marks_padding` has made all of them


class _Captured:
    """Two graphs over memory of their own."""

    def __init__(self, model: Student | Donor, ids_BT: Tensor, state: Stream, numerics: Numerics) -> None:
        self._inputs = [x.clone() for x in _inputs(ids_BT, state)]
        for weight in model.parameters():
            if weight.requires_grad and weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        # What makes autograd call this pass's backward; nothing flows into it.
        self._switch = torch.zeros((), device=ids_BT.device, requires_grad=True)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        ids, positions_BT, run_BT, kept_BT = self._inputs
        own = Stream(positions_BT, run_BT, kept_BT, collect=True)
        with recording(self._forward):
            found = _found(model.hidden_of(ids, own, numerics), own)
            layers = list(found.routing.values())
            self._layers = [torch.stack([one[part] for one in layers]) for part in range(4) if layers]
        self._numbers = list(found.routing)
        self._slopes = torch.zeros_like(found.hidden_BTH), torch.zeros_like(found.balance)
        ends = [x for x in found[:2] if x.requires_grad]
        with recording(self._backward, beside=self._forward):
            torch.autograd.backward(ends, list(self._slopes[: len(ends)]))
        self._out = found.hidden_BTH.detach(), found.balance.detach()

    def __call__(self, ids_BT: Tensor, state: Stream) -> Found:
        torch._foreach_copy_(self._inputs, _inputs(ids_BT, state))
        hidden_BTH, balance = _Replay.apply(self._switch, self)  # type: ignore[no-untyped-call]
        kept = zip(*(part.clone() for part in self._layers), strict=True)  # the next replay writes there again
        return Found(
            hidden_BTH, balance, {number: Routing(*one) for number, one in zip(self._numbers, kept, strict=False)}
        )

    def forward(self) -> tuple[Tensor, Tensor]:
        """Run what was captured on the inputs that lie there."""
        self._forward.replay()
        return self._out

    def backward(self, d_hidden_BTH: Tensor, d_balance: Tensor) -> None:
        """Add this pass's gradients to those of the weights."""
        for own, given in zip(self._slopes, (d_hidden_BTH, d_balance), strict=True):
            own.copy_(given)
        self._backward.replay()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, switch: Tensor, captured: _Captured) -> tuple[Tensor, Tensor]:
        ctx.captured = captured
        hidden_BTH, balance = captured.forward()
        return hidden_BTH.view_as(hidden_BTH), balance.clone()

    @staticmethod
    def backward(ctx: Any, d_hidden_BTH: Tensor, d_balance: Tensor) -> tuple[None, None]:
        ctx.captured.backward(d_hidden_BTH, d_balance)
        return None, None
