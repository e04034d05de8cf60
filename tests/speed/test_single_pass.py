"""Publish: one reading gives every digest, and many threads keep the order that one thread keeps."""

from __future__ import annotations

import errno
import json
import os
import struct
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vpstore.checkout import Checkout
from vpstore.errors import BadManifest, RecipeRefused, VpstoreError
from vpstore.runner import Staged, StagedFile
from vpstore.schema.attestation import BuildFacts
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import BuildRecord, Manifest
from vpstore.schema.ref import StageRef
from vpstore.schema.tensor_table import TensorTable
from vpstore.storage import hashing, system, tables
from vpstore.storage.stamps import Stamps
from vpstore.storage.store import Store
from vpstore.storage.tables import damaged_parts, read_shard
from vpstore.verbs import publish as publishing
from vpstore.verbs.publish import Publication, publish
from vpstore.workspace import Workspace

FACTS = BuildFacts("2026-01-01T00:00:00Z", "2026-01-01T00:00:01Z", 1, 1.0, {}, {"commit": None, "dirty": None}, {})


def shard(path: Path, sizes: list[int], seed: int = 0) -> list[bytes]:
    tensors = [bytes((seed + number + at) % 256 for at in range(size)) for number, size in enumerate(sizes)]
    header, at = {}, 0
    for number, data in enumerate(tensors):
        header[f"t{number:03}"] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
        at += len(data)
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + b"".join(tensors))
    return tensors


@given(st.lists(st.integers(0, 9000), max_size=8), st.sampled_from([1, 7, 4096, 1 << 20]))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_reading_digests_the_whole_and_each_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], piece: int
) -> None:
    monkeypatch.setattr(hashing, "WINDOW", 4096)
    monkeypatch.setattr(hashing, "_MAPPED", 1)
    monkeypatch.setattr(tables, "_PIECE", piece)
    path = tmp_path / "model.safetensors"
    tensors = shard(path, sizes)
    table, whole = read_shard(path, where="test", threads=1)
    assert whole == Digest.of(path.read_bytes())
    assert {row.name: row.digest for row in table.tensors} == {
        f"t{number:03}": Digest.of(data) for number, data in enumerate(tensors)
    }
    assert list(damaged_parts(path, table)) == []
    assert TensorTable.decode(table.encode(), where="test") == table


def test_a_shard_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    shard(path, [100, 100])
    original = tables._read_layout

    changes = [lambda data: data[:20] + b"X" + data[21:], lambda data: data + b"more"]

    def read_and_change(*arguments: object) -> object:
        found = original(*arguments)  # type: ignore[arg-type]
        path.write_bytes(changes.pop()(path.read_bytes()))
        return found

    monkeypatch.setattr(tables, "_read_layout", read_and_change)
    while changes:
        shard(path, [100, 100])
        with pytest.raises(BadManifest, match="changed while it was read"):
            read_shard(path, where="test")


def workspace(root: Path, name: str) -> Workspace:
    (root / "configs").mkdir(exist_ok=True)
    for file, text in {
        "pyproject.toml": '[tool.vpstore]\nobjects = "configs/objects.toml"\nprofiles = "configs"\n'
        'lock = "vpstore.lock"\nweights = "weights"\nreports = "reports"\n',
        "configs/tiny.toml": "",
    }.items():
        (root / file).write_text(text)
    store = Store.create(root / name, stamps=Stamps(root / f"{name}-stamps"))
    return Workspace(Checkout.find(root, profile="tiny"), store)


def staged(work: Workspace, count: int = 6) -> Publication:
    """Shards in the scratch folder, two of them alike, one file from elsewhere, and an intermediate."""
    record = BuildRecord("small.grow", (), {})
    scratch = work.store.scratch(record.key())
    files = []
    for number in range(count):
        path = scratch / f"model-{number}.safetensors"
        shard(path, [5000, 0, 300 + number], seed=number % (count - 1))
        files.append(StagedFile(f"{number}/{path.name}", "application/vnd.safetensors", path))  # a model each
    elsewhere = work.checkout.root / "elsewhere.safetensors"
    shard(elsewhere, [77], seed=9)
    files.append(StagedFile("elsewhere.safetensors", "application/vnd.safetensors", elsewhere))
    shard(scratch / "statistics", [64])
    parts = [StagedFile("statistics", "application/vnd.safetensors", scratch / "statistics")]
    return Publication(StageRef("plant", "bloom"), record, Staged(files, parts), scratch)


def put(work: Workspace) -> Manifest:
    return publish(work, staged(work), facts=lambda: FACTS)


def test_threads_publish_what_one_thread_publishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = put(workspace(tmp_path, "alone"))
    monkeypatch.setattr(publishing, "_LARGE", 1)
    work = workspace(tmp_path, "together")
    together = put(work)
    assert together.encoded == alone.encoded
    for digest in (together.digest, *together.blobs()):
        work.store.blobs.check(digest)
        assert work.store.blobs.path(digest).stat().st_mode & 0o777 == 0o444


def test_a_file_that_is_no_shard_is_refused_by_name_from_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "_LARGE", 1)
    work = workspace(tmp_path, "store")
    for name in ("3/model-3.safetensors", "elsewhere.safetensors"):
        publication = staged(work)
        source = next(file.source for file in publication.staged.files if file.path == name)
        source.write_bytes(b"no shard at all")
        with pytest.raises(RecipeRefused) as caught:
            publish(work, publication, facts=lambda: FACTS)
        assert name in caught.value.where
    assert list(work.store.keys.all()) == []


class Watched(system.Disk):
    """Counts calls from all threads, keeps what they did, and refuses one of them."""

    def __init__(self, refuse: int = 0) -> None:
        self._turn, self._refuse = threading.Lock(), refuse
        self.calls: list[tuple[str, str]] = []

    def _call(self, kind: str, name: str) -> None:
        with self._turn:
            self.calls.append((kind, name))
            if len(self.calls) == self._refuse:
                raise OSError(errno.EIO, os.strerror(errno.EIO), name)

    def fsync(self, descriptor: int) -> None:
        self._call("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        super().fsync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        self._call("rename", f"{source} {target}")
        super().rename(source, target)


def watch(monkeypatch: pytest.MonkeyPatch, refuse: int = 0) -> Watched:
    disk = Watched(refuse)
    monkeypatch.setattr(system, "disk", disk)
    monkeypatch.setattr(publishing, "_LARGE", 1)
    return disk


def test_with_threads_every_blob_is_durable_before_the_manifest_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = workspace(tmp_path, "store")
    disk = watch(monkeypatch)
    manifest = put(work)
    renames = {call[1].split()[1]: at for at, call in enumerate(disk.calls) if call[0] == "rename"}
    named = renames[str(work.store.blobs.path(manifest.digest))]
    for digest in manifest.blobs():
        target = work.store.blobs.path(digest)
        renamed = renames[str(target)]
        source = disk.calls[renamed][1].split()[0]
        assert ("fsync", source) in disk.calls[:renamed]
        assert ("fsync", str(target.parent)) in disk.calls[renamed:named]


def test_a_disk_error_in_any_thread_publishes_nothing_and_a_retry_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = workspace(tmp_path, "whole")
    publication = staged(work)
    counted = watch(monkeypatch)
    whole = publish(work, publication, facts=lambda: FACTS)
    total = len(counted.calls)
    assert total > 40
    before = threading.active_count()
    for refuse in range(1, total + 1, 4):
        work = workspace(tmp_path, f"store-{refuse}")
        monkeypatch.undo()
        publication = staged(work)
        disk = watch(monkeypatch, refuse)
        with pytest.raises(VpstoreError, match="Input/output error"):
            publish(work, publication, facts=lambda: FACTS)
        assert len(disk.calls) >= refuse
        assert threading.active_count() <= before
        for digest in work.store.blobs.all():
            work.store.blobs.check(digest)
        monkeypatch.undo()
        assert put(work).digest == whole.digest


def test_many_small_files_wait_for_the_disk_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk on which every fsync takes a while, whoever else waits for one: some ten of them at a time, not one."""
    at_once: list[int] = []
    waiting = {"now": 0}
    lock = threading.Lock()

    class Slow(system.Disk):
        def fsync(self, descriptor: int) -> None:
            with lock:
                waiting["now"] += 1
                at_once.append(waiting["now"])
            time.sleep(0.002)
            with lock:
                waiting["now"] -= 1

    monkeypatch.setattr(system, "disk", Slow())
    work = workspace(tmp_path, "store")
    publication = staged(work)
    for number in range(64):
        (tmp_path / f"{number}.txt").write_text(str(number))
        publication.staged.files.append(StagedFile(f"{number}.txt", "text/plain", tmp_path / f"{number}.txt"))
    publish(work, publication, facts=lambda: FACTS)
    assert max(at_once) >= 8
