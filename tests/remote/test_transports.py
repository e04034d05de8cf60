"""One suite for every remote: what is put is read, whole or not at all, right or refused."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from remote_places import PART, Place

from vpstore.errors import BlobMissing, DigestMismatch, RemoteFailure
from vpstore.schema.digest import Digest
from vpstore.storage.remotes.base import attestations_prefix, blob_name, key_name
from vpstore.storage.store import Store

SIZES = [0, 1, PART - 1, PART, PART + 1, 5 * PART + 17]

LARGE = 9_000_000  # more than any transport hands on at a time


def local(folder: Path, data: bytes) -> tuple[Path, Digest]:
    path = folder / f"local-{Digest.of(data).short}-{len(data)}"
    path.write_bytes(data)
    return path, Digest.of(data)


def nothing(count: int) -> None:
    pass


@pytest.mark.parametrize("size", SIZES)
def test_an_uploaded_blob_comes_back(place: Place, store: Store, tmp_path: Path, size: int) -> None:
    path, digest = local(tmp_path, os.urandom(size))
    name = blob_name(digest)
    assert place.remote.size(name) is None
    went: list[int] = []
    place.remote.upload(name, path, digest, moved=went.append)
    assert sum(went) == size
    assert place.contents() == {name: path.read_bytes()}
    assert place.remote.size(name) == size
    came: list[int] = []
    store.blobs.receive(digest, size, lambda start: place.remote.chunks(name, start=start), moved=came.append)
    assert sum(came) == size
    assert store.blobs.path(digest).read_bytes() == path.read_bytes()
    assert store.blobs.path(digest).stat().st_mode & 0o777 == 0o444
    assert place.pieces() == 0


def test_chunks_begin_where_they_are_asked_to(place: Place) -> None:
    data = os.urandom(LARGE)
    place.remote.write("blobs/x", data)
    for start in (0, 1, 4 << 20, LARGE - 1, LARGE, LARGE + 1):
        pieces = list(place.remote.chunks("blobs/x", start=start))
        assert b"".join(pieces) == data[start:]
        assert max(map(len, pieces), default=0) <= 8 << 20
    for _ in range(3):  # a stream may be left in the middle
        stream = place.remote.chunks("blobs/x")
        first = next(stream)
        assert first == data[: len(first)]
        stream.close()
    assert place.remote.size("blobs/x") == LARGE


def test_a_listing_names_what_is_there_and_only_that(place: Place) -> None:
    key, artifact, other = (Digest.of(text) for text in (b"key", b"artifact", b"other"))
    names = {
        key_name(key, artifact): b"{}",
        key_name(key, other): b"",
        f"{attestations_prefix(artifact)}x.json": b"{ }",
    }
    assert list(place.remote.list("keys/")) == []
    for name, data in names.items():
        place.remote.write(name, data)
    keys = sorted((name, len(data)) for name, data in names.items() if name.startswith("keys/"))
    assert list(place.remote.list("keys/")) == keys
    assert list(place.remote.list(f"keys/{key.hex[:2]}/{key.hex}/")) == keys
    assert list(place.remote.list(attestations_prefix(artifact))) == [(f"{attestations_prefix(artifact)}x.json", 3)]
    assert list(place.remote.list(attestations_prefix(other))) == []
    assert place.contents() == names
    place.remote.remove(keys[0][0])
    assert list(place.remote.list("keys/")) == keys[1:]


def test_a_file_in_the_place_of_a_folder_lists_nothing(place: Place) -> None:
    place.remote.write("keys/ab", b"{}")
    assert list(place.remote.list("keys/ab/")) == []
    assert list(place.remote.list("keys/")) == [("keys/ab", 2)]


def test_small_objects_are_read_replaced_and_removed(place: Place) -> None:
    name = "keys/ab/one"
    with pytest.raises(BlobMissing) as caught:
        place.remote.read(name, limit=10)
    assert name in caught.value.where
    with pytest.raises(BlobMissing):
        list(place.remote.chunks(name))
    place.remote.write(name, b"first")
    place.remote.write(name, b"the second")
    assert place.remote.read(name, limit=10) == b"the second"
    with pytest.raises(RemoteFailure, match="larger"):
        place.remote.read(name, limit=9)
    place.remote.remove(name)
    place.remote.remove(name)
    assert place.remote.size(name) is None
    assert place.contents() == {}


@pytest.mark.parametrize("size", [1000, 5 * PART + 17])
def test_a_damaged_object_is_replaced_by_a_healthy_one(place: Place, tmp_path: Path, size: int) -> None:
    path, digest = local(tmp_path, os.urandom(size))
    name = blob_name(digest)
    place.remote.write(name, b"\0" * (size + 1))
    place.remote.upload(name, path, digest, moved=nothing)
    assert place.contents() == {name: path.read_bytes()}


@pytest.mark.parametrize("size", [1000, 5 * PART + 17])
@pytest.mark.parametrize("there", [False, True])
def test_a_damaged_local_blob_is_never_uploaded(place: Place, tmp_path: Path, size: int, there: bool) -> None:
    data = os.urandom(size)
    path, _ = local(tmp_path, data)
    digest = Digest.of(data[:-1] + bytes([data[-1] ^ 1]))
    before = {}
    if there:
        before = {blob_name(digest): b"older"}
        place.remote.write(blob_name(digest), b"older")
    with pytest.raises(DigestMismatch) as caught:
        place.remote.upload(blob_name(digest), path, digest, moved=nothing)
    assert str(path) in caught.value.where
    assert digest in caught.value.expected
    assert place.contents() == before
    assert place.pieces() == 0


def test_a_local_blob_that_is_not_there_is_said_to_be_missing_here(place: Place, tmp_path: Path) -> None:
    digest = Digest.of(b"x")
    with pytest.raises(BlobMissing) as caught:
        place.remote.upload(blob_name(digest), tmp_path / "gone", digest, moved=nothing)
    assert caught.value.where == str(tmp_path / "gone")
    assert place.contents() == {}


@pytest.mark.parametrize("name", ["../x", "/x", "a/../x", "a//x", "a/./x", "", "/", "a\0b", "a\\b", "x" * 1000])
def test_names_that_lead_elsewhere_are_refused(place: Place, tmp_path: Path, name: str) -> None:
    path, digest = local(tmp_path, b"x")
    for call in (
        lambda: place.remote.size(name),
        lambda: place.remote.read(name, limit=1),
        lambda: list(place.remote.chunks(name)),
        lambda: list(place.remote.list(name)),
        lambda: place.remote.write(name, b""),
        lambda: place.remote.upload(name, path, digest, moved=nothing),
        lambda: place.remote.remove(name),
    ):
        with pytest.raises(RemoteFailure):
            call()
    assert place.contents() == {}


def test_many_threads_share_one_remote(place: Place, store: Store, tmp_path: Path) -> None:
    blobs = [local(tmp_path, os.urandom(3 * PART + number)) for number in range(24)]

    def both_ways(blob: tuple[Path, Digest]) -> int:
        path, digest = blob
        name = blob_name(digest)
        place.remote.upload(name, path, digest, moved=nothing)
        store.blobs.receive(digest, None, lambda start: place.remote.chunks(name, start=start), moved=nothing)
        return place.remote.size(name) or 0

    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(both_ways, blobs))
    assert sizes == [path.stat().st_size for path, _ in blobs]
    assert place.contents() == {blob_name(digest): path.read_bytes() for path, digest in blobs}
    assert all(store.blobs.is_whole(digest, full=True) for _, digest in blobs)


def test_one_blob_uploaded_by_many_at_once(place: Place, tmp_path: Path) -> None:
    path, digest = local(tmp_path, os.urandom(8 * PART))
    remotes = [place.remote, *([place.open() for _ in range(3)] if place.outlives else [])]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda remote: remote.upload(blob_name(digest), path, digest, moved=nothing), remotes))
    assert place.contents() == {blob_name(digest): path.read_bytes()}
    assert place.pieces() == 0
