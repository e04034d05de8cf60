"""Two walks through a model's layers that rebuild its attention, layer by layer, on the stream of what is rebuilt.

Place in the path: walk -> **model**; morph_real declares one intermediate for each step.

Invariants: fits see the fit rows, figures the probe rows; and those of `walk`.

Shapes: B batch, T tokens, N tokens of all rows, H hidden.

Example:
    >>> walk = Walk(reader, Modes(compat, real), Rowset(fit_rows, probe_rows), Knobs(fit, damping=0.5))
    >>> tensors = walk.step("local", 1, {})
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.model.config import StudentConfig
from recipes.model.layerwise import Layerwise, Row, advance, layer_of
from recipes.model.morph import Fit, morph_global, morph_local, raw_heads, refit_output
from recipes.model.transformer import Layer
from recipes.model.walk import Rowset, TwoStreams, tensors_in, with_figures
from recipes.tensors import TensorReader

Phase = Literal["local", "global"]


@dataclass(frozen=True)
class Modes:
    """The parent's architecture and the one that it becomes."""

    compat: StudentConfig
    real: StudentConfig


@dataclass(frozen=True)
class Knobs:
    """How each layer is fitted, and how much of the drift of the stream its output is asked to undo."""

    fit: Fit
    damping: float


def step_name(phase: Phase, number: int) -> str:
    """Name of the step that fits 1-based layer `number`."""
    return f"{phase}-{number:03d}"


def steps(config: StudentConfig) -> list[tuple[Phase, int]]:
    """All steps in order: the local layers; then the global ones, and each local one behind the first global."""
    layers = range(1, config.num_layers + 1)
    local: list[tuple[Phase, int]] = [("local", n) for n in layers if not config.is_global(n)]
    return local + [("global", n) for n in layers if n >= config.global_every]


def layer_tensors(number: int, done: Mapping[str, Path]) -> dict[str, Path]:
    """Where the newest version of each rebuilt tensor of a layer lies: suffix -> file of a finished step."""
    found: dict[str, Path] = {}
    phases: tuple[Phase, ...] = ("local", "global")
    for phase in phases:
        path = done.get(step_name(phase, number))
        if path is not None:
            found.update(dict.fromkeys(tensors_in(path), path))
    return found


class Walk(TwoStreams[Row]):
    """The parent's stream, and that of the student so far; each phase walks from the start."""

    def __init__(self, reader: TensorReader, modes: Modes, rows: Rowset, knobs: Knobs) -> None:
        super().__init__()
        self._parent = Layerwise(reader, modes.compat, device=rows.device)
        self._modes, self._rows, self._knobs = modes, rows, knobs
        self._phase: Phase | None = None

    def step(self, phase: Phase, number: int, done: Mapping[str, Path]) -> dict[str, Tensor]:
        """Fit one layer.

        Args:    done: files of the steps before this one, by step name.
        Returns: the layer's rebuilt tensors, named without their layer prefix, and its figures.
        """
        self._go_to(phase, number, done)
        old = self._parent.layer(number)
        wanted = _attention_outputs(old, self._old)
        count = len(self._rows.fit)
        targets = [
            y + self._knobs.damping * (before.x_BTH - after.x_BTH)
            for y, before, after in zip(wanted[:count], self._old[:count], self._new[:count], strict=True)
        ]
        earlier = self._earlier(number, done)
        tensors = self._rebuilt(phase, old, targets, earlier)
        new = self._layer(number, {**earlier, **tensors})
        figures = {"output_error": _relative_error(wanted[count:], _attention_outputs(new, self._new[count:]))}
        if phase == "local":
            figures.update(_factor_figures(old, new, self._new[count:]))
        return with_figures(tensors, figures)

    def endings(self, phase: Phase, done: Mapping[str, Path]) -> tuple[list[Tensor], list[Tensor]]:
        """Hidden states after the final norm on the probe rows: the parent's, and those that this phase leads to."""
        self._go_to(phase, self._modes.real.num_layers + 1, done)
        count = len(self._rows.fit)
        old, new = (self._parent.finish(streams[count:]) for streams in (self._old, self._new))
        return [row.x_BTH for row in old], [row.x_BTH for row in new]

    def _rebuilt(
        self, phase: Phase, old: Layer, targets: Sequence[Tensor], earlier: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        streams, fit, real = self._new[: len(targets)], self._knobs.fit, self._modes.real
        if phase == "local":
            return morph_local(old, real, streams, targets, fit=fit)
        if real.is_global(old.number):
            return morph_global(old, real, streams, targets, fit=fit)
        return refit_output(self._layer(old.number, earlier), streams, targets, fit=fit)

    def _go_to(self, phase: Phase, number: int, done: Mapping[str, Path]) -> None:
        if phase != self._phase:
            self._phase, self._at = phase, -1
        self._bring_to(number, done)

    def _started(self) -> tuple[list[Row], list[Row]]:
        rows = self._rows.all()
        return self._parent.start(rows), self._parent.start(rows)

    def _passed(self, number: int, done: Mapping[str, Path]) -> tuple[list[Row], list[Row]]:
        return advance(self._parent.layer(number), self._old), advance(self._student_layer(number, done), self._new)

    def _student_layer(self, number: int, done: Mapping[str, Path]) -> Layer:
        """The layer as the finished steps have it; the parent's where none has touched it."""
        found = self._earlier(number, done)
        return self._layer(number, found) if found else self._parent.layer(number)

    def _earlier(self, number: int, done: Mapping[str, Path]) -> dict[str, Tensor]:
        """What the finished steps have rebuilt of a layer."""
        files = layer_tensors(number, done)
        contents = {path: tensors_in(path, device=self._rows.device) for path in set(files.values())}
        return {name: contents[path][name] for name, path in files.items()}

    def _layer(self, number: int, attention: Mapping[str, Tensor]) -> Layer:
        old = self._parent.layer(number)
        kept = {name: value for name, value in old.state_dict().items() if not name.startswith("self_attn.")}
        return layer_of({**kept, **attention}, self._modes.real, number=number)


@torch.no_grad()
def _attention_outputs(layer: Layer, streams: Sequence[Row]) -> list[Tensor]:
    outputs = []
    for x_BTH, state in streams:
        outputs.append(layer.self_attn(layer.input_layernorm(x_BTH), state))
        state.shared.clear()
    return outputs


def _relative_error(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """|wanted - got| / |wanted| over all rows, Frobenius norms."""
    gap = math.fsum(float((a.double() - b.double()).square().sum()) for a, b in zip(wanted, got, strict=True))
    return float((gap / math.fsum(float(a.double().square().sum()) for a in wanted)) ** 0.5)


def _factor_figures(old: Layer, new: Layer, streams: Sequence[Row]) -> dict[str, float]:
    """How close the factors come to the maps that they replace, on the same inputs."""
    want, got = raw_heads(old, streams), raw_heads(new, streams)
    constants = new.state_dict()["self_attn.a_k.weight"][0].double() / new.self_attn.config.kv_rank
    with torch.no_grad():
        c_N = torch.cat([new.input_layernorm(x).flatten(0, 1) for x, _ in streams]).double() @ constants
    return {
        "query_cosine": float(F.cosine_similarity(want.q.double(), got.q.double(), dim=-1).mean()),
        "query_r2": _r2(want.q, got.q),
        "key_cosine": float(F.cosine_similarity(want.k.double(), got.k.double(), dim=-1).mean()),
        "value_r2": _r2(want.v, got.v),
        "smallest_constant": float(c_N.min()),
        "flipped_share": float((c_N <= 0).double().mean()),
    }


def _r2(want: Tensor, got: Tensor) -> float:
    spread = (want - want.mean(dim=0)).double().square().sum()
    return float(1 - (want - got).double().square().sum() / spread)
