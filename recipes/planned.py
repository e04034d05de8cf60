"""A tensor that does not exist yet: what a recipe promises, and what the shard writer lays out.

Place in the path: below recipe and tensors, which both speak of it.

Invariants: no torch at import time; the dtypes are those that are ever written, under the names safetensors gives them.

Example:
    >>> PlannedTensor("model.norm.weight", "BF16", (64,), lambda: torch.ones(64, dtype=torch.bfloat16)).size_bytes
    128
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Dtype = Literal["BF16", "F16", "F32", "F64", "I64", "I32", "I16", "I8", "U8", "BOOL"]


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor that will exist: its shape and dtype are promises, held before and after it is computed."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    compute: Callable[[], Tensor]

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        width = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}.get(self.dtype, 1)
        return width * math.prod(self.shape)
