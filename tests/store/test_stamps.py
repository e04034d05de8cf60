"""Stat stamps: they save reading, never hide a change, and their loss costs nothing but time."""

from __future__ import annotations

import hashlib
import multiprocessing
import time
from pathlib import Path

import pytest
from damage_tools import flip

from vpstore.errors import RecipeRefused
from vpstore.storage.outside import check_sha256
from vpstore.storage.stamps import Stamps, Stat
from vpstore.storage.store import Store


def settle(path: Path) -> None:
    """Wait until a change from now on would show in the file's times."""
    while not Stat.of(path).is_settled(time.time_ns()):
        time.sleep(0.01)


def test_stamps_expire_and_belong_to_one_file(tmp_path: Path) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"x")
    other.write_bytes(b"x")
    settle(other)
    stamps = Stamps(tmp_path / "stamps")
    stamps.record([(Stat.of(path), "blake3:1")])
    assert stamps.holds(path, "blake3:1")
    assert Stamps(tmp_path / "stamps").holds(path, "blake3:1")
    assert not stamps.holds(path, "blake3:2")
    assert not stamps.holds(other, "blake3:1")
    assert not Stamps(tmp_path / "stamps", max_age=-1).holds(path, "blake3:1")
    stamps.forget(path)
    assert not stamps.holds(path, "blake3:1")


def test_a_file_that_changed_a_moment_ago_gets_no_stamp(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x")
    stamps = Stamps(tmp_path / "stamps")
    stamps.record([(Stat.of(path)._replace(ctime_ns=time.time_ns() + 10**9), "blake3:1")])
    assert not stamps.holds(path, "blake3:1")


def test_stamps_that_cannot_be_kept_cost_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "stamps").write_text("a file where the folder should be")
    path = tmp_path / "a"
    path.write_bytes(b"x")
    settle(path)
    stamps = Stamps(tmp_path / "stamps")
    stamps.record([(Stat.of(path), "blake3:1")])
    assert not stamps.holds(path, "blake3:1")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "stamps.sqlite").write_bytes(b"no database " * 1000)
    damaged = Stamps(tmp_path / "damaged")
    damaged.record([(Stat.of(path), "blake3:1")])
    assert not damaged.holds(path, "blake3:1")


def record_many(folder: str, path: str, names: list[str]) -> None:
    stamps = Stamps(Path(folder))
    for name in names:
        stamps.record([(Stat.of(Path(path)), name)])


def test_many_processes_share_the_stamps(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x")
    settle(path)
    names = [[f"blake3:{process}-{row}" for row in range(20)] for process in range(4)]
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=record_many, args=(str(tmp_path / "s"), str(path), part)) for part in names]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    stamps = Stamps(tmp_path / "s")
    assert all(stamps.holds(path, name) for part in names for name in part)


def test_sources_are_held_against_their_sha256(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "donor"
    path.write_bytes(b"weights")
    settle(path)
    sha256 = hashlib.sha256(b"weights").hexdigest()
    stamps = store.blobs.stamps
    check_sha256(path, sha256, size_bytes=7, stamps=stamps)
    assert stamps.holds(path, f"sha256:{sha256}")
    flip(path, 0)
    for size in (7, None):
        with pytest.raises(RecipeRefused, match="other bytes"):
            check_sha256(path, sha256, size_bytes=size, stamps=stamps)
    with pytest.raises(RecipeRefused, match="wrong size"):
        check_sha256(path, sha256, size_bytes=8, stamps=stamps)
    with pytest.raises(RecipeRefused, match="missing"):
        check_sha256(tmp_path / "absent", sha256, size_bytes=None, stamps=stamps)
    with pytest.raises(RecipeRefused, match="not a file"):
        check_sha256(tmp_path, sha256, size_bytes=None, stamps=stamps)
