"""The store's disk: writes are whole or absent, blobs are right or found damaged, stamps never hide a change."""

from __future__ import annotations

import errno
import multiprocessing
import os
import stat
import time
from pathlib import Path

import pytest
from damage_tools import flip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vpstore.errors import BadManifest, BlobMissing, DigestMismatch, NoStore, VpstoreError
from vpstore.schema.digest import Digest
from vpstore.storage import atomic, modes
from vpstore.storage.stamps import Stat
from vpstore.storage.store import Store


def settle(path: Path) -> None:
    """Wait until a change from now on would show in the file's times."""
    while not Stat.of(path).is_settled(time.time_ns()):
        time.sleep(0.01)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.lists(st.binary(max_size=300), max_size=6))
def test_what_is_put_is_read(store: Store, values: list[bytes]) -> None:
    for value in values:
        digest = store.blobs.put_bytes(value)
        assert store.blobs.read(digest) == value
        assert store.blobs.path(digest).stat().st_mode & 0o777 == 0o444
        assert digest in set(store.blobs.all())
    assert list(store.blobs.strays()) == []
    assert list((store.root / "tmp").iterdir()) == []


def test_put_copy_and_take_agree_with_put_bytes(store: Store, tmp_path: Path) -> None:
    data = os.urandom(3 * 1024 * 1024 + 17)
    source = tmp_path / "source"
    source.write_bytes(data)
    assert store.blobs.put_copy(source) == (Digest.of(data), len(data))
    assert source.read_bytes() == data
    other = store.root / "work" / "other"
    other.write_bytes(data[1:])
    digest, size = atomic.digest_file(other)
    store.blobs.take(other, digest)
    assert not other.exists()
    assert (store.blobs.read(digest), size) == (data[1:], len(data) - 1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.integers(0, 0o777), st.sampled_from([0o022, 0o002, 0o027, 0o077, 0o000]))
def test_a_file_that_is_taken_in_has_the_mode_of_every_blob(store: Store, mode: int, umask: int) -> None:
    before = os.umask(umask)
    try:
        source = store.root / "work" / "made"
        source.write_bytes(os.urandom(8))
        digest = atomic.digest_file(source)[0]
        source.chmod(mode)  # as its maker wants it
        store.blobs.take(source, digest)
        assert stat.S_IMODE(store.blobs.path(digest).stat().st_mode) == 0o444 & ~umask
        put = store.blobs.put_bytes(os.urandom(8))
        assert stat.S_IMODE(store.blobs.path(put).stat().st_mode) == 0o444 & ~umask
        # Without /proc, too; and nobody else's file is made under another umask meanwhile.
        assert modes.umask(store.root) == modes._seen_at_a_new_file(store.root / "tmp") == umask
        assert list((store.root / "tmp").iterdir()) == []
    finally:
        assert os.umask(before) == umask


def test_a_missing_blob_says_which(store: Store) -> None:
    with pytest.raises(BlobMissing) as caught:
        store.blobs.read(Digest.of(b"x"), what="the thing")
    assert caught.value.expected == Digest.of(b"x")
    assert not store.blobs.is_whole(Digest.of(b"x"))


def test_a_flipped_bit_is_found_though_mode_and_time_say_nothing(store: Store) -> None:
    digest = store.blobs.put_bytes(b"hello" * 100)
    path = store.blobs.path(digest)
    settle(path)
    store.blobs.check(digest)
    assert store.blobs.stamps.holds(path, digest)
    flip(path, 7)
    assert not store.blobs.stamps.holds(path, digest)
    with pytest.raises(DigestMismatch):
        store.blobs.ensure(digest, what="it")
    with pytest.raises(DigestMismatch):
        store.blobs.read(digest)


def test_a_whole_blob_replaces_a_damaged_one_which_is_kept_aside(store: Store) -> None:
    digest = store.blobs.put_bytes(b"healthy")
    flip(store.blobs.path(digest), 0)
    damaged = store.blobs.path(digest).read_bytes()
    assert store.blobs.put_bytes(b"healthy") == digest
    assert store.blobs.read(digest) == b"healthy"
    assert [path.read_bytes() for path in (store.root / "quarantine").iterdir()] == [damaged]


def test_the_second_of_two_writers_leaves_the_first_ones_blob_alone(store: Store) -> None:
    """Both found it missing; the faster one placed it meanwhile."""
    digest = store.blobs.put_bytes(b"raced")
    before = Stat.of(store.blobs.path(digest))
    late = store.root / "tmp" / "late"
    late.write_bytes(b"raced")
    store.blobs._place(late, digest)
    assert Stat.of(store.blobs.path(digest)) == before
    assert not late.exists()
    assert list((store.root / "quarantine").iterdir()) == []


def test_putting_a_whole_blob_again_does_not_touch_it(store: Store) -> None:
    digest = store.blobs.put_bytes(b"once")
    before = Stat.of(store.blobs.path(digest))
    store.blobs.put_bytes(b"once")
    assert Stat.of(store.blobs.path(digest)) == before


@pytest.mark.parametrize("step", ["write", "fsync", "replace", "fchmod"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_fault_at_any_step_leaves_no_blob_and_no_litter(
    store: Store, monkeypatch: pytest.MonkeyPatch, step: str, code: int
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        if step == "write":
            patch.setattr(atomic.TemporaryFile, "write", fail)
        else:
            patch.setattr(atomic.os, step, fail)
        with pytest.raises(OSError, match=os.strerror(code)):
            store.blobs.put_bytes(b"precious")
    assert not store.blobs.has(Digest.of(b"precious"))
    assert list((store.root / "tmp").iterdir()) == []
    assert store.blobs.read(store.blobs.put_bytes(b"precious")) == b"precious"


def test_short_writes_are_continued(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stubborn:
        def __init__(self, inner: object) -> None:
            self.inner = inner

        def write(self, data: memoryview) -> int:
            return int(self.inner.write(data[:3]))  # type: ignore[attr-defined]

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

    with atomic.TemporaryFile(store.root / "tmp") as out:
        out._file = Stubborn(out._file)  # type: ignore[assignment]
        out.write(b"0123456789")
        out.commit(store.root / "result")
    assert (store.root / "result").read_bytes() == b"0123456789"


def test_disk_errors_say_where_and_what_next() -> None:
    with pytest.raises(VpstoreError) as caught, atomic.disk_errors("/somewhere", "publishing"):
        raise OSError(errno.ENOSPC, "no space")
    assert caught.value.where == "/somewhere"
    assert "free space" in caught.value.next_step
    with pytest.raises(FileNotFoundError), atomic.disk_errors("/somewhere", "reading"):
        raise FileNotFoundError(errno.ENOENT, "a fault of the program stays one")


def test_writing_equal_bytes_leaves_the_file_alone(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file"
    assert atomic.write_if_different(target, b"a")
    before = Stat.of(target)
    assert not atomic.write_if_different(target, b"a")
    assert Stat.of(target) == before
    assert atomic.write_if_different(target, b"b")
    assert target.read_bytes() == b"b"


def test_a_store_is_made_once_and_only_in_an_empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VPSTORE_ROOT", raising=False)
    root = tmp_path / ".vpstore"
    with pytest.raises(NoStore):
        Store.open(root)
    Store.create(root)
    Store.create(root)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert Store.find(tmp_path / "a" / "b").root == root
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.txt").write_text("keep me")
    with pytest.raises(NoStore, match="not empty"):
        Store.create(strange)
    assert [path.name for path in strange.iterdir()] == ["thesis.txt"]
    monkeypatch.setenv("VPSTORE_ROOT", str(strange))
    with pytest.raises(NoStore):
        Store.find(tmp_path)


@pytest.mark.parametrize("text", ["vpstore 3\n", "", "vpstore 1", "x"])
def test_another_format_is_refused(tmp_path: Path, text: str) -> None:
    root = Store.create(tmp_path / "s").root
    (root / "format").chmod(0o644)
    (root / "format").write_text(text)
    with pytest.raises(NoStore) as caught:
        Store.open(root)
    assert caught.value.exit_code == 10


def test_keys_are_claims_with_a_checked_form(store: Store) -> None:
    key, one, two = Digest.of(b"k"), Digest.of(b"1"), Digest.of(b"2")
    assert store.keys.artifacts(key) == ()
    store.keys.add(key, one)
    store.keys.add(key, two)
    store.keys.add(key, two)
    assert store.keys.artifacts(key) == tuple(sorted([one, two]))
    damaged = next(store.keys.all())
    flip(damaged, 20)
    assert len(store.keys.artifacts(key)) == 1
    with pytest.raises(BadManifest):
        store.keys.read(damaged)


def hold(root: str, key: str, log: str) -> None:
    store = Store.open(Path(root))
    with store.lock(Digest.parse(key), waiting=lambda: None):
        with open(log, "a") as out:
            out.write("in\n")
        time.sleep(0.05)
        with open(log, "a") as out:
            out.write("out\n")


def test_one_key_has_one_builder(store: Store, tmp_path: Path) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    arguments = (str(store.root), str(Digest.of(b"k")), str(log))
    workers = [context.Process(target=hold, args=arguments) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert log.read_text().split() == ["in", "out"] * 4


def test_large_files_are_digested_as_small_ones(tmp_path: Path) -> None:
    for size in (0, 1, (1 << 20) - 1, 1 << 20, (8 << 20) + 5):
        data = os.urandom(size)
        path = tmp_path / "file"
        path.write_bytes(data)
        assert atomic.digest_file(path) == (Digest.of(data), size)
