"""Work spread over any number of processes. How many there are decides nothing but the time.

Place in the path: text -> **workers** -> token ids.

Invariants: at most `GROUP` items of an ordered map are in flight, so that memory does not grow with the corpus; a
process that the system killed ends the work with a clear error instead of a hanging one; processes leave with the
process that started them, also if that was killed.

Example:
    with Workers(make_encoder, (directory,)) as encode:
        for rendered in encode(payloads): ...
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any, Self

from vpstore.errors import UsageError, VpstoreError

WORKERS_VARIABLE = "VPSTORE_WORKERS"
GROUP = 512

_function: Callable[[Any], Any] | None = None  # of this worker process


class Workers:
    """Applies `make(*arguments)` to items; in this process if the environment asks for no more than one."""

    def __init__(self, make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
        """Start the processes.

        Args:    make: an importable function; what it returns is made once in each process.
        Raises:  UsageError: the environment asks for something that is no number of processes.
        """
        workers = number_of_workers()
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
        """The results, lazily and in the order of the items.

        Raises:  VpstoreError: a process was killed; and whatever the function raises.
        """
        source = iter(items)
        if self._pool is None:
            yield from map(self._here, source)
            return
        with _noticing_death():
            while group := list(islice(source, GROUP)):
                yield from self._pool.map(_apply, group, chunksize=16)

    def as_they_come(self, items: Iterable[Any]) -> Iterator[Any]:
        """The results, lazily and in any order: for few items of much work each.

        Raises:  VpstoreError: a process was killed; and whatever the function raises.
        """
        if self._pool is None:
            yield from map(self._here, items)
            return
        with _noticing_death():
            for done in as_completed([self._pool.submit(_apply, item) for item in items]):
                yield done.result()


def number_of_workers() -> int:
    """How many processes the environment asks for.

    Raises:  UsageError: it says something else than a whole number from 1 on.
    """
    found = os.environ.get(WORKERS_VARIABLE, "1")
    if not (found.isascii() and found.isdigit() and int(found) > 0):
        next_step = "unset it, or give it a whole number from 1 on: as many processes as memory allows"
        raise UsageError("not a number of processes", where=WORKERS_VARIABLE, found=repr(found), next_step=next_step)
    return int(found)


@contextmanager
def _noticing_death() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise VpstoreError(
            "a process that prepared data was killed",
            where=WORKERS_VARIABLE,
            found="most often the system ran out of memory",
            next_step=f"build again with a smaller {WORKERS_VARIABLE}: what is finished is kept",
        ) from error


def _set_up(make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    global _function
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _function = make(*arguments)


def _leave_with_parent() -> None:
    """A killed build must not leave processes behind that hold memory and wait for work for ever."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _apply(item: Any) -> Any:
    assert _function is not None
    return _function(item)
