"""Whether a run can begin: the model's longest row, the card's number formats, and its memory, before the first step.

Place in the path: loop -> **memory**. What a step takes is counted from the shapes; the figure is an upper estimate,
so that a run that is let through does not fail after an hour, and one that is refused is told what to set.

Legend: B rows and T tokens of a micro-batch, H hidden, V vocabulary.

Invariants: nothing is allocated to find out; a CPU is not judged, as its memory is shared with everything else.

Example:
    require_can_train(model, params)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from recipes.model.donor import Donor
from recipes.model.transformer import Student
from recipes.params.training import TrainingParams
from recipes.train.optimizer import BATCH_ELEMENTS_ON_GPU, kind_of
from recipes.train.sharding import shared_names
from vpstore.errors import RecipeRefused

_GIB = 1 << 30
_FLOAT32 = 4
# Bytes of the kernels' workspaces; copies of a float32 number that the optimizer makes of each matrix in a batch; and
# the share of all the rest that lies in gaps, as the pools of captured graphs do not lend each other memory.
_WORKSPACE = _GIB
_OPTIMIZER_COPIES = 6
_GAPS = 0.1


class StepMemory(NamedTuple):
    """Bytes that a step takes besides the weights."""

    gradients: int
    optimizer: int
    activations: int
    head: int
    workspace: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)

    def __str__(self) -> str:
        parts = " + ".join(f"{name} {value / _GIB:.1f}" for name, value in self._asdict().items())
        return f"{self.total / _GIB:.1f} GiB: {parts}"


def step_memory(model: Student | Donor, params: TrainingParams, *, ranks: int = 1) -> StepMemory:
    """What a step takes of each rank, from shapes alone; the model may lie on the meta device."""
    weights = dict(model.named_parameters())
    shared = shared_names(model) if isinstance(model, Student) and ranks > 1 else ()
    counts = {name: weight.numel() // (ranks if name in shared else 1) for name, weight in weights.items()}
    states = {name: 1 if kind_of(name, weight) == "matrix" else 2 for name, weight in weights.items()}
    narrow = 2 if params.precision == "bfloat16" else _FLOAT32
    tokens = params.micro_sequences * params.sequence_length
    vocab, hidden = model.head_weight.shape
    rows = min(params.loss.chunk, tokens)
    in_matrices = sum(count for name, count in counts.items() if kind_of(name, weights[name]) == "matrix")
    parts = StepMemory(
        gradients=_FLOAT32 * sum(counts.values()),
        optimizer=_FLOAT32 * sum(counts[name] * states[name] for name in counts),
        activations=narrow * tokens * model.kept_numbers(recompute=params.recompute),
        # The scores of a chunk, the head in the products' dtype, and its gradient before it is the weight's: a sum
        # over chunks, which the next chunk's product is added to in new memory.
        head=narrow * vocab * (rows + hidden) + 2 * _FLOAT32 * vocab * hidden,
        workspace=_WORKSPACE + _OPTIMIZER_COPIES * _FLOAT32 * min(in_matrices, BATCH_ELEMENTS_ON_GPU),
    )
    return parts._replace(workspace=parts.workspace + int(_GAPS * (parts.total - parts.workspace)))


def require_can_train(model: Student | Donor, params: TrainingParams, *, ranks: int = 1) -> None:
    """Refuse what would fail, or go wrong unseen, once it ran.

    Raises:  RecipeRefused: rows longer than the model's longest, a card without bfloat16, too little memory on it.
    """
    if params.sequence_length > model.max_sequence:
        raise RecipeRefused(
            "the rows are longer than what the model is made for",
            where="train.sequence_length",
            expected=f"at most {model.max_sequence}",
            found=str(params.sequence_length),
            next_step="lower train.sequence_length",
        )
    device = model.head_weight.device
    if device.type != "cuda":
        return
    if params.precision == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise RecipeRefused(
            "this card has no bfloat16 products",
            where=torch.cuda.get_device_name(device),
            expected="compute capability 8.0 or above",
            found=".".join(map(str, torch.cuda.get_device_capability(device))),
            next_step='set train.precision = "float32", or take another card',
        )
    needed = step_memory(model, params, ranks=ranks)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if needed.total > free:
        raise _too_little(params, str(needed), f"{free / _GIB:.1f} GiB free beside the weights")


@contextmanager
def memory_refused(params: TrainingParams) -> Iterator[None]:
    """Say what to set if the card's memory runs out in the middle; the state that was saved last stays.

    Raises:  RecipeRefused: memory ran out.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise _too_little(params, "enough for the step", str(error).splitlines()[0][:300]) from error


def _too_little(params: TrainingParams, expected: str, found: str) -> RecipeRefused:
    steps = [] if params.recompute else ["set train.recompute = true"]
    if params.micro_sequences > 1:
        steps.append(f"lower train.micro_sequences, now {params.micro_sequences}")
    steps.append(f"lower train.loss.chunk, now {params.loss.chunk}")
    if params.precision == "float32":
        steps.append('set train.precision = "bfloat16"')
    return RecipeRefused(
        "the card has too little memory for a step",
        where="the GPU that VPSTORE_DEVICE asks for",
        expected=expected,
        found=found,
        next_step=f"{', or '.join(steps)}; the state that was saved last is kept",
    )
