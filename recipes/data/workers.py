"""A map over many items in any number of processes, with the results in the order of the items.

Place in the path: text -> **workers** -> token ids. How many processes there are decides nothing but the time.

Invariants: at most `GROUP` items are in flight, so that memory does not grow with the corpus.

Example:
    with OrderedMap(make_encoder, (directory,)) as encode:
        for rendered in encode(payloads): ...
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from typing import Any, Self

WORKERS_VARIABLE = "VPSTORE_WORKERS"
GROUP = 512

_function: Callable[[Any], Any] | None = None  # of this worker process


class OrderedMap:
    """Applies `make(*arguments)` to items; in this process if the environment asks for no more than one."""

    def __init__(self, make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
        """Start the processes.

        Args:    make: an importable function; what it returns is made once in each process.
        """
        workers = int(os.environ.get(WORKERS_VARIABLE, "1"))
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, spawn, initializer=_set_up, initargs=(make, arguments))
        else:
            self._here = make(*arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __call__(self, items: Iterable[Any]) -> Iterator[Any]:
        """The results, lazily and in order."""
        source = iter(items)
        if self._pool is None:
            yield from map(self._here, source)
            return
        while group := list(islice(source, GROUP)):
            yield from self._pool.map(_apply, group, chunksize=16)


def _set_up(make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    global _function
    _function = make(*arguments)


def _apply(item: Any) -> Any:
    assert _function is not None
    return _function(item)
