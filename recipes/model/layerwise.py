"""A student whose weights are read one module at a time, so that a model larger than memory can be walked.

Place in the path: recipe -> **model**. Surgery recipes walk their parent and their own staged result with it; training
loads whole models with recipes.checkpoint instead.

Invariants: the modules and the order of operations are those of `Student`, so logits are the same bits; one layer's
weights are held at a time; they are read in their stored dtype and cast to the compute dtype, pinned ones to float32.
Weights go to the device that is asked for; the rows must be there already.

Shapes: B batch, T tokens, H hidden, V vocabulary.

Example:
    >>> model = Layerwise(context.inputs["parent"].tensors(), config)
    >>> logits = model.logits([(ids_BT, documents_BT)])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.data.batches import Batch
from recipes.model.config import StudentConfig
from recipes.model.modules import RmsNorm
from recipes.model.stream import Stream
from recipes.model.transformer import Layer, Student
from recipes.names import EMBEDDING, FINAL_NORM, HEAD, LOG_FREQ, layer_tensor
from recipes.ops.compare import Distance
from recipes.tensors import TensorReader, iterate_rows
from vpstore.errors import RecipeRefused

_HEAD_ROWS = 8192  # ids whose logits are compared at a time
_Module = TypeVar("_Module", bound=nn.Module)
Rows = tuple[Tensor, Tensor | None]  # ids [B, T], documents [B, T]


def rows_of(batches: Sequence[Batch], *, device: torch.device | str = "cpu") -> list[Rows]:
    """What a model reads of each batch, on the device."""
    return [(batch.ids_BT.to(device), batch.documents_BT.to(device)) for batch in batches]


class Row(NamedTuple):
    """A stream under way, and what its layers share."""

    x_BTH: Tensor  # shape letters
    state: Stream


def filled(module: _Module, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, where: str) -> _Module:
    """The module with these weights, in `dtype` (pinned tensors in float32), without gradients.

    Raises:  RecipeRefused: a missing, an unexpected or a misshaped tensor.
    """
    try:
        module.load_state_dict(dict(tensors), strict=True, assign=True)
    except RuntimeError as error:
        raise RecipeRefused(
            "stored tensors do not fit the model",
            where=where,
            found=" ".join(str(error).split())[:400],
            next_step="compare the checkpoint's config.json with its tensors",
        ) from error
    return module.to(dtype).requires_grad_(False)


class Layerwise:
    """Walks a checkpoint; see the module's invariants."""

    def __init__(
        self,
        reader: TensorReader,
        config: StudentConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.reader, self.config, self.dtype, self.device = reader, config, dtype, device

    def start(self, rows: Sequence[Rows], *, collect: bool = False) -> list[Row]:
        """Embedded tokens and fresh states, one for each batch."""
        with torch.device("meta"):
            student = Student(self.config)
        # Rows are cast after they are looked up: the whole table in float32 would be by far the largest thing here.
        table_VH = self._read(EMBEDDING)
        filled(student.model.embed_tokens, {"weight": table_VH}, dtype=table_VH.dtype, where=EMBEDDING)
        if student.model.grape is not None:
            filled(student.model.grape, {"log_freq": self._read(LOG_FREQ)}, dtype=self.dtype, where=LOG_FREQ)
        with torch.no_grad():
            started = [student.start(ids, documents, collect=collect) for ids, documents in rows]
        return [Row(x_BTH.to(self.dtype), state) for x_BTH, state in started]

    def layer(self, number: int) -> Layer:
        """The block of 1-based `number`, freshly read."""
        prefix = layer_tensor(number, "")
        names = [name for name in self.reader.names() if name.startswith(prefix)]
        tensors = {name.removeprefix(prefix): self._read(name) for name in names}
        return layer_of(tensors, self.config, number=number, dtype=self.dtype)

    def hidden(self, rows: Sequence[Rows], *, collect: bool = False) -> list[Row]:
        """Streams after the final norm; layers are the outer loop, so each is read once."""
        streams = self.start(rows, collect=collect)
        for number in range(1, self.config.num_layers + 1):
            streams = advance(self.layer(number), streams)
        return self.finish(streams)

    def finish(self, streams: Sequence[Row]) -> list[Row]:
        """The final norm."""
        with torch.device("meta"):
            norm = RmsNorm(self.config.hidden_size, eps=self.config.norm_eps)
        filled(norm, {"weight": self._read(FINAL_NORM)}, dtype=self.dtype, where=FINAL_NORM)
        with torch.no_grad():
            return [Row(norm(x), state) for x, state in streams]

    def head(self) -> Tensor:
        """The output matrix [V, H] in the compute dtype."""
        return self._read(HEAD).to(self.dtype)

    def logits(self, rows: Sequence[Rows]) -> list[Tensor]:
        """Logits [B, T, V] of each batch."""
        head_VH = self.head()
        return [F.linear(x, head_VH) for x, _ in self.hidden(rows)]

    def head_rows(self, start: int, stop: int) -> Tensor:
        """Rows start .. stop of the output matrix in the compute dtype."""
        return self.reader.rows(HEAD, start, stop).to(self.device).to(self.dtype)

    def _read(self, name: str) -> Tensor:
        return self.reader.read(name).to(self.device)


def logit_distance(
    before: Layerwise, before_rows: Sequence[Row], after: Layerwise, after_rows: Sequence[Row]
) -> Distance:
    """How far the logits of two models are apart, on what `hidden` gave for the same rows.

    Both heads are read in ranges of rows: whole, head and logits would be the largest things in memory.
    """
    apart = Distance()
    with torch.no_grad():
        for start, stop in iterate_rows(before.config.vocab_size, _HEAD_ROWS):
            old_VH, new_VH = before.head_rows(start, stop), after.head_rows(start, stop)
            for old, new in zip(before_rows, after_rows, strict=True):
                apart.add(F.linear(old.x_BTH, old_VH), F.linear(new.x_BTH, new_VH))
    return apart


def layer_of(
    tensors: Mapping[str, Tensor], config: StudentConfig, *, number: int, dtype: torch.dtype = torch.float32
) -> Layer:
    """A block with these weights, named without their layer prefix.

    Raises:  RecipeRefused: a missing, an unexpected or a misshaped tensor.
    """
    with torch.device("meta"):
        layer = Layer(config, number=number)
    return filled(layer, tensors, dtype=dtype, where=f"layer {number}")


def advance(layer: Layer, streams: Sequence[Row]) -> list[Row]:
    """Each stream after `layer`; score biases are dropped again, because they are large and quick to make."""
    moved = []
    with torch.no_grad():
        for x_BTH, state in streams:
            moved.append(Row(layer(x_BTH, state), state))
            state.shared.clear()
    return moved
