"""A walk through the donor's layers that builds the student's beside them, each on the stream that the built ones give.

Place in the path: walk -> **model**; convert_dense declares one intermediate for each step.

Invariants: fits see the fit rows, figures the probe rows; one layer of each model is in memory; and those of `walk`.

Shapes: B batch, T tokens, H hidden.

Example:
    >>> walk = Walk(reader, donor_config, Rowset(fit_rows, probe_rows), knobs)
    >>> tensors = walk.step(1, {})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from recipes.model.config import DonorConfig, StudentConfig
from recipes.model.convert_attention import Setting, Streams, fit_attention, pool_attention
from recipes.model.convert_ffn import Examples, FfnSetting, fit_ffn, pool_ffn
from recipes.model.convert_heads import DonorRow
from recipes.model.donor import Donor, DonorLayer
from recipes.model.layerwise import Row, advance, filled, layer_of
from recipes.model.transformer import Layer, Student
from recipes.model.walk import Rowset, TwoStreams, tensors_in, with_figures
from recipes.names import EMBEDDING, layer_tensor
from recipes.tensors import TensorReader

_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


@dataclass(frozen=True)
class Knobs:
    """The target and how to reach it."""

    config: StudentConfig
    ffn: FfnSetting
    is_fitted: bool
    ridge: float
    drift: float
    token_limit: float
    value_residual: float

    def setting(self, number: int) -> Setting:
        """What the attention of one layer needs to know."""
        return Setting(self.config, number, self.ridge, self.value_residual, self.token_limit)


def step_name(number: int) -> str:
    """Name of the step that builds 1-based layer `number`."""
    return f"layer-{number:03d}"


class Walk(TwoStreams[DonorRow]):
    """The donor's stream, and that of the student so far."""

    def __init__(self, reader: TensorReader, donor: DonorConfig, rows: Rowset, knobs: Knobs) -> None:
        super().__init__()
        self._reader, self._donor, self._rows, self._knobs = reader, donor, rows, knobs
        self._ahead: dict[int, tuple[list[DonorRow], list[Row]]] = {}  # behind the layer that was built last

    def step(self, number: int, done: Mapping[str, Path]) -> dict[str, Tensor]:
        """Build one layer.

        Args:    done: files of the steps before this one, by step name.
        Returns: the layer's tensors, named without their layer prefix and in their stored dtypes, and its figures.
        """
        self._bring_to(number, done)
        old, knobs, count = self._donor_layer(number), self._knobs, len(self._rows.fit)
        fit = Streams(self._old[:count], self._new[:count], knobs.drift)
        prefix = layer_tensor(number, "")
        tensors = {name: self._read(prefix + name).to(torch.bfloat16) for name in _NORMS}
        if knobs.is_fitted:
            attention, figures = fit_attention(old, fit, knobs.setting(number))
        else:
            attention, figures = pool_attention(old, fit.student, knobs.setting(number)), {}
        tensors.update({f"self_attn.{name}": value for name, value in attention.items()})
        blank = {f"mlp.{name}": value for name, value in pool_ffn(old.mlp, width=knobs.ffn.width).items()}
        half = layer_of({**tensors, **blank}, knobs.config, number=number)
        middle = _after_attention(old, half, Streams(self._old, self._new, knobs.drift))
        figures["attention_r2"] = _r2(middle.wanted[count:], middle.got[count:])
        ffn, ffn_figures = self._ffn(old, half, middle.streams, count)
        tensors.update({f"mlp.{name}": value for name, value in ffn.items()})
        figures.update(ffn_figures)
        return with_figures(tensors, figures)

    def _ffn(
        self, old: DonorLayer, half: Layer, streams: Streams, count: int
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        with torch.no_grad():
            wanted = [old.mlp(old.post_attention_layernorm(row.x_BTH)) for row in streams.donor]
            inputs = [half.post_attention_layernorm(row.x_BTH) for row in streams.student]
        targets = streams.targets(wanted)
        figures: dict[str, float] = {}
        if self._knobs.is_fitted:
            examples = Examples.of(_flat(inputs[:count]), _flat(targets[:count]), limit=self._knobs.token_limit)
            tensors, fitted = fit_ffn(old.mlp, examples, self._knobs.ffn)
            figures = {f"ffn_fit_{name}": value for name, value in fitted.items()}
        else:
            tensors = pool_ffn(old.mlp, width=self._knobs.ffn.width)
        filled(half.mlp, tensors, dtype=torch.float32, where=f"feed-forward of layer {half.number}")
        with torch.no_grad():
            got = [half.mlp(x) for x in inputs]
        figures["ffn_r2"] = _r2(wanted[count:], got[count:])
        # The same sums, in the same order, as the two layers form them: what a new walk would get from the files.
        donor = [DonorRow(row.x_BTH + y, row.state) for row, y in zip(streams.donor, wanted, strict=True)]
        student = [Row(row.x_BTH + y, row.state) for row, y in zip(streams.student, got, strict=True)]
        self._ahead = {half.number: (donor, student)}
        return tensors, figures

    def stream_figures(self, done: Mapping[str, Path]) -> dict[str, Tensor]:
        """How far the student's stream is from the donor's behind the last layer, on the probe rows."""
        self._bring_to(self._donor.num_hidden_layers + 1, done)
        count = len(self._rows.fit)
        value = _r2([row.x_BTH for row in self._old[count:]], [row.x_BTH for row in self._new[count:]])
        return with_figures({}, {"stream_r2": value})

    def _started(self) -> tuple[list[DonorRow], list[Row]]:
        self._ahead = {}
        with torch.device("meta"):
            donor, student = Donor(self._donor.model_copy(update={"num_hidden_layers": 0})), Student(self._knobs.config)
        table: dict[str, Tensor] = {"weight": self._read(EMBEDDING)}
        for embedding in (donor.model.embed_tokens, student.model.embed_tokens):
            filled(embedding, table, dtype=torch.float32, where=EMBEDDING)
        rows = self._rows.all()
        return [DonorRow(*donor.start(*row)) for row in rows], [Row(*student.start(*row)) for row in rows]

    def _passed(self, number: int, done: Mapping[str, Path]) -> tuple[list[DonorRow], list[Row]]:
        if number in self._ahead:
            return self._ahead.pop(number)
        self._ahead = {}
        layer = self._donor_layer(number)
        old = [DonorRow(layer(x, state), state) for x, state in self._old]
        built = tensors_in(done[step_name(number)], device=self._rows.device)
        return old, advance(layer_of(built, self._knobs.config, number=number), self._new)

    def _donor_layer(self, number: int) -> DonorLayer:
        with torch.device("meta"):
            layer = DonorLayer(self._donor)
        prefix = layer_tensor(number, "")
        names = [name for name in self._reader.names() if name.startswith(prefix)]
        tensors = {name.removeprefix(prefix): self._read(name) for name in names}
        return filled(layer, tensors, dtype=torch.float32, where=f"donor layer {number}")

    def _read(self, name: str) -> Tensor:
        return self._reader.read(name).to(self._rows.device)


@dataclass(frozen=True)
class Middle:
    """A layer after its attention: what was wanted, what came, and the streams."""

    wanted: list[Tensor]
    got: list[Tensor]
    streams: Streams


@torch.no_grad()
def _after_attention(old: DonorLayer, new: Layer, streams: Streams) -> Middle:
    wanted = [old.self_attn(old.input_layernorm(x), state) for x, state in streams.donor]
    got = []
    for x_BTH, state in streams.student:
        got.append(new.self_attn(new.input_layernorm(x_BTH), state))
        state.shared.clear()
    donor = [DonorRow(row.x_BTH + y, row.state) for row, y in zip(streams.donor, wanted, strict=True)]
    student = [Row(row.x_BTH + y, row.state) for row, y in zip(streams.student, got, strict=True)]
    return Middle(wanted, got, Streams(donor, student, streams.drift))


def _flat(rows: Sequence[Tensor]) -> Tensor:
    return torch.cat([row.flatten(0, 1) for row in rows])


def _r2(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """1 - squared error / energy around the mean, all rows together."""
    want_TH, got_TH = _flat(wanted).double(), _flat(got).double()
    spread = (want_TH - want_TH.mean(0)).square().sum()
    return float(1 - (want_TH - got_TH).square().sum() / spread.clamp(min=1e-300))
