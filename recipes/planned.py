"""A tensor that does not exist yet: what a recipe promises, and what the shard writer lays out.

Place in the path: below recipe and tensors, which both speak of it.

Invariants: no torch at import time; the dtypes are those that are ever written, under the names safetensors gives them;
`rows`, where a tensor has it, gives the same values as `compute`.

Example:
    >>> PlannedTensor("model.norm.weight", "BF16", (64,), lambda: torch.ones(64, dtype=torch.bfloat16)).size_bytes
    128
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Dtype = Literal["BF16", "F16", "F32", "F64", "I64", "I32", "I16", "I8", "U8", "BOOL"]
WIDTHS: dict[Dtype, int] = {  # bytes of one number
    **{"BF16": 2, "F16": 2, "F32": 4, "F64": 8},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1},
}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor that will exist: its shape and dtype are promises, held before and after it is computed."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    compute: Callable[[], Tensor]
    # Consecutive ranges of the first dimension, so that the whole is never in memory; safe beside other tensors' rows.
    rows: Callable[[], Iterator[Tensor]] | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        return WIDTHS[self.dtype] * math.prod(self.shape)

    def value(self) -> Tensor | Iterator[Tensor]:
        """The tensor, or where it has `rows` those, in order."""
        return self.compute() if self.rows is None else self.rows()
