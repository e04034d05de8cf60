"""Reading and hashing: the same digests whatever way the bytes come, and an error where they cannot be had."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vpstore.schema.digest import Digest
from vpstore.storage import hashing
from vpstore.storage.hashing import digest_file, digest_many, in_threads, threads_for, windows

PAGE = 4096


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "WINDOW", PAGE)
    monkeypatch.setattr(hashing, "_MAPPED", 1)


@pytest.fixture
def old_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_POPULATE_READ", 9999)


def around(edge: int) -> list[int]:
    return [edge - 1, edge, edge + 1]


@pytest.mark.parametrize("size", [0, 1, *around(1 << 20), *around(hashing.WINDOW), 2 * hashing.WINDOW + 5])
@pytest.mark.parametrize("threads", [1, blake3.AUTO])
def test_a_digest_is_of_all_the_bytes(tmp_path: Path, size: int, threads: int) -> None:
    path = tmp_path / "blob"
    path.write_bytes(bytes(range(251)) * (size // 251 + 1))
    os.truncate(path, size)
    assert digest_file(path, threads=threads) == (Digest.of(path.read_bytes()), size)


def test_a_kernel_that_cannot_say_whether_pages_are_there_is_read_plainly(tmp_path: Path, old_kernel: None) -> None:
    path = tmp_path / "blob"
    path.write_bytes(os.urandom((3 << 20) + 7))
    with path.open("rb", buffering=0) as source:
        assert max(map(len, windows(source))) == hashing._BUFFER
    assert digest_file(path)[0] == Digest.of(path.read_bytes())


def test_a_file_that_shrinks_while_it_is_read_ends_where_it_ends(tmp_path: Path, small_windows: None) -> None:
    """Mapped memory beyond the end of a file would end the process by a signal."""
    path = tmp_path / "blob"
    path.write_bytes(os.urandom(10 * PAGE))
    with path.open("rb", buffering=0) as source:
        read = bytearray()
        for number, window in enumerate(windows(source)):
            read += window
            if number == 1:
                os.truncate(path, 3 * PAGE + 100)
    assert bytes(read) == path.read_bytes()


def test_a_file_that_grows_while_it_is_read_is_read_to_its_end(tmp_path: Path, small_windows: None) -> None:
    path = tmp_path / "blob"
    path.write_bytes(os.urandom(3 * PAGE))
    with path.open("rb", buffering=0) as source:
        read = bytearray()
        for number, window in enumerate(windows(source)):
            read += window
            if number == 0:
                with path.open("ab") as more:
                    more.write(b"more")
    assert bytes(read) == path.read_bytes()


@given(st.lists(st.integers(0, 3 * PAGE), max_size=6), st.integers(1, 3))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_many_are_answered_in_the_order_of_the_question(
    tmp_path: Path, small_windows: None, sizes: list[int], workers: int
) -> None:
    paths = []
    for number, size in enumerate(sizes):
        paths.append(tmp_path / f"{number}")
        paths[-1].write_bytes(os.urandom(size))
    hashing_all = [Digest.of(path.read_bytes()) for path in paths]
    found = list(digest_many(paths, workers=workers))
    assert [row.path for row in found] == paths
    assert [row.digest for row in found] == hashing_all
    assert [row.size_bytes for row in found] == sizes


def test_what_cannot_be_read_is_a_result(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.write_bytes(os.urandom(2 << 20))
    found = list(digest_many([tmp_path / "absent", good, tmp_path], workers=2))
    assert isinstance(found[0].error, FileNotFoundError)
    assert found[1].digest == Digest.of(good.read_bytes())
    assert found[1].stat is not None
    assert isinstance(found[2].error, IsADirectoryError)
    assert [row.digest for row in (found[0], found[2])] == [None, None]


def test_a_file_that_changes_while_it_is_read_gets_no_stat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "blob"
    path.write_bytes(b"before")

    def read_and_change(path: Path, *, threads: int) -> tuple[Digest, int]:
        found = digest_file(path, threads=threads)
        path.write_bytes(b"afterwards")
        return found

    monkeypatch.setattr(hashing, "digest_file", read_and_change)
    (found,) = digest_many([path])
    assert found.digest == Digest.of(b"before")
    assert found.stat is None


def test_a_file_that_is_most_of_the_work_is_shared_among_the_cores() -> None:
    assert threads_for(100, 100, workers=2) == blake3.AUTO
    assert threads_for(100, 1600, workers=2) == 1
    assert threads_for(100, 100, workers=1) == 1


def test_threads_stop_at_the_first_failure_and_pass_it_on() -> None:
    begun: list[int] = []
    gate = threading.Event()

    def work(item: int) -> int:
        begun.append(item)
        if item == 1:
            raise ValueError("item 1")
        if item > 1:
            gate.wait(10)  # until the failure was seen
        return item

    before = threading.active_count()
    results = in_threads(work, list(range(50)), workers=3)
    assert next(results) == 0
    gate.set()
    with pytest.raises(ValueError, match="item 1"):
        next(results)
    assert threading.active_count() <= before
    assert in_order(begun)


def in_order(items: list[int]) -> bool:
    return items[0] == 0 and sorted(items) == list(range(len(items)))


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_results_are_in_the_order_of_the_items(workers: int) -> None:
    assert list(in_threads(lambda item: item * item, list(range(20)), workers=workers)) == [n * n for n in range(20)]
