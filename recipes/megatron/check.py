"""The numeric check at the end of an export and of an import: logits of fixed tokens, Megatron's side against ours.

Place in the path: forward -> **megatron** -> export, import_megatron. A wrong order of q, k and v passes every strict
loader; only numbers tell.

Invariants: always the same tokens; ours are those of `load_student`, walked one layer at a time, so that a model
larger than memory can be checked.

Example:
    >>> agreement(folder.read, reader, config).relative
    1.2e-06
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.megatron import forward
from recipes.megatron.forward import Read
from recipes.model.config import StudentConfig
from recipes.model.layerwise import Layerwise
from recipes.tensors import TensorReader
from vpstore.errors import RecipeRefused

# o200k ids of a fixed English text: the first sentences of Lincoln's address at Gettysburg, 1863.
TOKENS = (
    35604, 8429, 326, 12938, 2101, 5288, 1039, 73361, 11311, 21806, 402, 495, 48623, 11, 261, 620, 10422, 11, 95114,
    306, 51868, 11, 326, 14024, 316, 290, 58286, 484, 722, 1966, 553, 5371, 12629, 13, 6549, 581, 553, 25703, 306,
    261, 2212, 12721, 3656, 11, 11493, 5588, 484, 10422, 11, 503, 1062, 10422, 813, 95114, 326, 813, 14024, 11, 665,
    1701, 68038, 13,
)  # fmt: skip
# What two orders of summation may make of float32: measured 1e-6 to 3e-6.
MOST_RELATIVE = 2e-5


@dataclass(frozen=True)
class Agreement:
    """How two computations of the same logits stand to each other."""

    relative: float  # largest difference over the largest logit
    loss_ours: float  # nats a token
    loss_megatron: float


def agreement(read: Read, reader: TensorReader, config: StudentConfig) -> Agreement:
    """Compare what Megatron makes of a checkpoint with what `load_student` makes of ours."""
    ids_s = torch.tensor(TOKENS)
    with torch.no_grad():
        theirs = forward.logits(read, forward.hidden_states(read, config, ids_s))
        ours = own_logits(reader, config)
    largest = float(ours.abs().max())
    return Agreement(float((theirs - ours).abs().max()) / largest, loss_of(ours), loss_of(theirs))


def own_logits(reader: TensorReader, config: StudentConfig) -> Tensor:
    """Logits of the fixed tokens as `load_student` gives them, [s, V]."""
    walker = Layerwise(reader, config)
    with torch.no_grad():
        ((hidden, _),) = walker.hidden([(torch.tensor(TOKENS)[None], None)])
        # The head in its stored dtype, cast some rows at a time: in float32 it would be by far the largest thing here.
        return forward.logits(lambda _: reader.read("lm_head.weight"), hidden[0])


def loss_of(logits_sV: Tensor) -> float:
    """Mean loss of the fixed tokens, nats; logsumexp, since torch's log_softmax on a CPU is off by 2e-5 here."""
    nexts = torch.tensor(TOKENS)[1:, None]
    rows = logits_sV[:-1].double()
    return float((torch.logsumexp(rows, dim=-1) - rows.gather(-1, nexts)[:, 0]).mean())


def require_agreement(found: Agreement, *, where: str) -> None:
    """Refuse logits that are not the same.

    Raises:  RecipeRefused: with both losses.
    """
    if not found.relative <= MOST_RELATIVE:
        raise RecipeRefused(
            "Megatron would compute other logits than this student",
            where=where,
            expected=f"a relative difference of at most {MOST_RELATIVE:g}, loss {found.loss_ours:.6f}",
            found=f"{found.relative:.3g}, loss {found.loss_megatron:.6f}",
            next_step="a layout is wrong, most often the order of q, k and v: compare with recipes/megatron/layout.py",
        )
