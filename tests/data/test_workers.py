from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from recipes.data.workers import GROUP, Workers
from vpstore.errors import UsageError, VpstoreError


def make_square(offset: int) -> Callable[[int], int]:
    return lambda number: number * number + offset


def make_mortal() -> Callable[[int], int]:
    def work(number: int) -> int:
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    return work


@pytest.mark.parametrize("workers", ["1", "2"])
def test_results_come_in_order_and_all_of_them(monkeypatch: pytest.MonkeyPatch, workers: str) -> None:
    monkeypatch.setenv("VPSTORE_WORKERS", workers)
    numbers = range(GROUP + 100)
    with Workers(make_square, (3,)) as work:
        assert list(work(numbers)) == [number * number + 3 for number in numbers]
        assert sorted(work.as_they_come(range(40))) == [number * number + 3 for number in range(40)]


def test_no_more_than_a_group_is_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VPSTORE_WORKERS", "2")
    drawn = 0

    def items() -> Iterator[int]:
        nonlocal drawn
        for number in range(10 * GROUP):
            drawn += 1
            yield number

    with Workers(make_square, (0,)) as work:
        results = work(items())
        next(results)
        assert drawn == GROUP
        results.close()


@pytest.mark.parametrize("is_ordered", [True, False])
def test_a_killed_process_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, is_ordered: bool) -> None:
    monkeypatch.setenv("VPSTORE_WORKERS", "2")
    with (
        Workers(make_mortal, ()) as work,
        pytest.raises(VpstoreError, match="was killed") as caught,
    ):
        list(work(range(100)) if is_ordered else work.as_they_come(range(100)))
    assert "VPSTORE_WORKERS" in caught.value.next_step


@pytest.mark.parametrize("found", ["two", "-1", "0", "00", "1.5", "", "²"])
def test_what_is_no_number_of_processes(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setenv("VPSTORE_WORKERS", found)
    with pytest.raises(UsageError, match="not a number"):
        Workers(make_square, (0,))
