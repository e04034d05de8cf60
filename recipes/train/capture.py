"""CUDA graphs: kernels that are launched together, recorded once.

Place in the path: passes, optimizer_gpu -> **here**.

Invariants: nothing is collected while kernels are recorded: what a collection frees belongs to other streams, and
waiting for them is not allowed there.

Example:
    graph = torch.cuda.CUDAGraph()
    with recording(graph):
        y.copy_(x * 2)
    graph.replay()

Source:  https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, *, beside: torch.cuda.CUDAGraph | None = None) -> Iterator[None]:
    """Record what runs inside into `graph`; in the memory of `beside`, if one is named."""
    gc.collect()
    is_collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=None if beside is None else beside.pool()):
            yield
    finally:
        if is_collecting:
            gc.enable()
