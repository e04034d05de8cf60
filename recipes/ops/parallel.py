"""Independent blocks of rows on several cores, without a barrier after every small operation.

Place in the path: below `recipes.ops.omp`. Each block runs on one thread with one intra-op thread: many small tensor
operations in a row lose more to waiting for one another than they gain from sharing.

Invariants: blocks are cut by size alone, never by the number of threads, so results do not depend on it.

Example:
    >>> over_rows(lambda start, stop: (start, stop), 5, 2)
    [(0, 2), (2, 4), (4, 5)]
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


def over_rows(work: Callable[[int, int], Result], rows: int, block: int) -> list[Result]:
    """Apply `work` to consecutive ranges of rows.

    Args:    work: given start and stop; touches nothing that another range touches.
    Returns: the results in the order of the ranges; empty if there are no rows.
    """
    ranges = [(start, min(start + block, rows)) for start in range(0, rows, block)]
    threads = torch.get_num_threads()
    if len(ranges) < 2 or threads < 2:
        return [work(*span) for span in ranges]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(lambda span: work(*span), ranges))
    finally:
        torch.set_num_threads(threads)
