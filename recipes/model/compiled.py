"""What torch.compile makes, compiled once for each kind of what it is given.

Place in the path: layers, optimizer -> **here**, on a GPU. Shapes are fixed: a kernel made for any shape is slower, and
a run has few.

Example:
    step = compiled(Layer.step)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")
# Variants of one function in one process: kinds of layers or of matrices, with and without gradients, each shape.
_KINDS = 64


def compiled(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """`function` as one graph; what cannot be compiled whole is an error, not a slow step."""
    from torch._dynamo import config  # loaded where something is compiled, and nowhere else

    config.recompile_limit = max(config.recompile_limit, _KINDS)
    return torch.compile(function, dynamic=False, fullgraph=True)
