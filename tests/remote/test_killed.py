"""Transfers that were killed are taken up: what went over does not go over again, and nothing wrong is taken up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet
from fault_proxy import FaultProxy
from remote_places import PART, QUICK, DirectoryPlace, FilesPlace, Place, S3Place, S3Server, s3_files

from vpstore.errors import DigestMismatch, RemoteFailure
from vpstore.schema.digest import Digest
from vpstore.storage import atomic
from vpstore.storage.partial import Wanted, complete
from vpstore.storage.remotes.base import blob_name
from vpstore.storage.remotes.s3 import S3Remote
from vpstore.storage.store import Store

REPOSITORY = Path(__file__).resolve().parents[2]
CHILD = """
import os, signal
from pathlib import Path
from vpstore.schema.digest import Digest
from vpstore.storage.remotes.base import blob_name
from vpstore.storage.remotes.s3 import S3Remote
from vpstore.storage.store import Store
from vpstore.storage.stamps import Stamps
{recipe}
left = {limit}
def moved(count):
    global left
    left -= count
    if left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
digest = Digest({digest!r})
"""
UPLOAD = "remote.upload(blob_name(digest), Path({path!r}), digest, moved=moved)\n"
DOWNLOAD = (
    "store = Store.open(Path({store!r}), stamps=Stamps(Path({store!r}) / 'stamps'))\n"
    "store.blobs.receive(digest, {size}, lambda start: remote.chunks(blob_name(digest), start=start), moved=moved)\n"
)


def killed(code: str) -> None:
    """Run Python that ends itself by SIGKILL."""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


def blob(folder: Path, size: int) -> tuple[Path, Digest]:
    data = os.urandom(size)
    path = folder / "local"
    path.write_bytes(data)
    return path, Digest.of(data)


def resuming(place: type[Place], size: int, limit: int) -> ParameterSet:
    return pytest.param(place, size, limit, id=place.__name__)


@pytest.mark.parametrize(
    ("kind", "size", "limit"),
    [resuming(DirectoryPlace, 5 * atomic.CHUNK + 17, 3 * atomic.CHUNK), resuming(S3Place, 20 * PART + 17, 9 * PART)],
)
def test_a_killed_upload_is_taken_up(
    kind: type[Place], size: int, limit: int, tmp_path: Path, s3_server: S3Server
) -> None:
    place = kind(tmp_path / "remote", s3_server)
    path, digest = blob(tmp_path, size)
    killed(CHILD.format(recipe=place.recipe(), limit=limit, digest=str(digest)) + UPLOAD.format(path=str(path)))
    assert blob_name(digest) not in place.contents()
    assert place.pieces() > 0
    went: list[int] = []
    place.remote.upload(blob_name(digest), path, digest, moved=went.append)
    assert 0 < sum(went) <= size - limit
    assert place.contents() == {blob_name(digest): path.read_bytes()}
    assert place.pieces() == 0


@pytest.mark.parametrize(
    ("kind", "size", "limit"),
    [
        resuming(DirectoryPlace, 4 * atomic.CHUNK + 17, 2 * atomic.CHUNK),
        resuming(S3Place, (20 << 20) + 17, 8 << 20),
        resuming(FilesPlace, (20 << 20) + 17, 8 << 20),
    ],
)
def test_a_killed_download_is_taken_up(
    kind: type[Place], size: int, limit: int, tmp_path: Path, s3_server: S3Server, store: Store
) -> None:
    place = kind(tmp_path / "remote", s3_server)
    path, digest = blob(tmp_path, size)
    name = blob_name(digest)
    if isinstance(place, S3Place):  # in one piece: what is tried here is the way back
        place.server.client.put_object(Bucket=place.bucket, Key=f"models/vpstore/{name}", Body=path.read_bytes())
    else:
        place.remote.upload(name, path, digest, moved=lambda count: None)
    killed(
        CHILD.format(recipe=place.recipe(), limit=limit, digest=str(digest))
        + DOWNLOAD.format(store=str(store.root), size=size)
    )
    left = store.root / "tmp" / "partial" / digest.hex
    assert limit <= left.stat().st_size < size
    assert not store.blobs.has(digest)
    had = left.stat().st_size
    starts: list[int] = []
    came: list[int] = []

    def chunks(start: int) -> Iterator[bytes]:
        starts.append(start)
        return place.remote.chunks(name, start=start)

    store.blobs.receive(digest, size, chunks, moved=came.append)
    assert starts == [had]
    assert sum(came) == size - had
    assert store.blobs.is_whole(digest, full=True)
    assert list(left.parent.iterdir()) == []


def test_only_the_parts_that_a_killed_run_did_not_send_are_sent(tmp_path: Path, s3_server: S3Server) -> None:
    """Counted by the server's side: what each request carried."""
    place = S3Place(tmp_path, s3_server)
    path, digest = blob(tmp_path, 20 * PART + 17)
    killed(CHILD.format(recipe=place.recipe(), limit=9 * PART, digest=str(digest)) + UPLOAD.format(path=str(path)))
    there = place.pieces()
    with FaultProxy(s3_server.port) as proxy:
        remote = S3Remote(s3_files(proxy.endpoint), f"{place.bucket}/models", "s3", patience=QUICK, part_size=PART)
        remote.upload(blob_name(digest), path, digest, moved=lambda count: None)
        parts = [request for request in proxy.requests if request.operation == "part"]
    assert there >= 9
    assert len(parts) == 21 - there
    assert sum(request.sent_bytes for request in parts) == path.stat().st_size - there * PART


def test_a_part_with_other_bytes_is_sent_again(tmp_path: Path, s3_server: S3Server) -> None:
    place = S3Place(tmp_path, s3_server)
    path, digest = blob(tmp_path, 4 * PART)
    key = f"models/vpstore/{blob_name(digest)}"
    upload = s3_server.client.create_multipart_upload(Bucket=place.bucket, Key=key)["UploadId"]
    data = path.read_bytes()
    good, other, short = data[:PART], b"\0" * PART, data[2 * PART : 3 * PART - 1]
    for number, body in ((1, good), (2, other), (3, short), (7, good)):
        s3_server.client.upload_part(Bucket=place.bucket, Key=key, UploadId=upload, PartNumber=number, Body=body)
    went: list[int] = []
    place.remote.upload(blob_name(digest), path, digest, moved=went.append)
    assert sum(went) == 3 * PART  # only the first was ours
    assert place.contents() == {blob_name(digest): data}
    assert place.pieces() == 0


def test_what_several_older_runs_left_is_gone_afterwards(tmp_path: Path, s3_server: S3Server) -> None:
    place = S3Place(tmp_path, s3_server)
    path, digest = blob(tmp_path, 4 * PART)
    key = f"models/vpstore/{blob_name(digest)}"
    for number in (1, 2, 3):
        upload = s3_server.client.create_multipart_upload(Bucket=place.bucket, Key=key)["UploadId"]
        s3_server.client.upload_part(
            Bucket=place.bucket, Key=key, UploadId=upload, PartNumber=number, Body=path.read_bytes()[:PART]
        )
    assert place.pieces() == 3
    place.remote.upload(blob_name(digest), path, digest, moved=lambda count: None)
    assert place.contents() == {blob_name(digest): path.read_bytes()}
    assert place.pieces() == 0


def test_uploads_of_other_keys_are_left_alone(tmp_path: Path, s3_server: S3Server) -> None:
    place = S3Place(tmp_path, s3_server)
    path, digest = blob(tmp_path, 4 * PART)
    longer = f"models/vpstore/{blob_name(digest)}-longer"
    s3_server.client.create_multipart_upload(Bucket=place.bucket, Key=longer)
    place.remote.upload(blob_name(digest), path, digest, moved=lambda count: None)
    assert place.contents() == {blob_name(digest): path.read_bytes()}
    assert place.pieces() == 1


def test_a_damaged_local_blob_ends_the_upload_that_was_taken_up(tmp_path: Path, s3_server: S3Server) -> None:
    for kind, size in ((DirectoryPlace, 3 * atomic.CHUNK), (S3Place, 20 * PART)):
        place = kind(tmp_path / kind.__name__, s3_server)
        path, digest = blob(tmp_path, size)
        killed(CHILD.format(recipe=place.recipe(), limit=size // 2, digest=str(digest)) + UPLOAD.format(path=str(path)))
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(DigestMismatch):
            place.remote.upload(blob_name(digest), path, digest, moved=lambda count: None)
        assert place.contents() == {}
        assert place.pieces() == 0


@pytest.mark.parametrize("size_bytes", [1000, None])
@pytest.mark.parametrize("left", [b"x" * 10, b"y" * 1000, b"x" * 999 + b"y", b"z" * 2000])
def test_wrong_bytes_that_were_left_are_not_taken_up_twice(store: Store, size_bytes: int | None, left: bytes) -> None:
    data = b"x" * 1000
    digest = Digest.of(data)
    folder = store.root / "tmp" / "partial"
    folder.mkdir(parents=True)
    (folder / digest.hex).write_bytes(left)
    starts: list[int] = []

    def chunks(start: int) -> Iterator[bytes]:
        starts.append(start)
        return iter([data[start:]])

    store.blobs.receive(digest, size_bytes, chunks, moved=lambda count: None)
    assert store.blobs.read(digest) == data
    assert list(folder.iterdir()) == []
    assert starts[-1] == (0 if data[: len(left)] != left else len(left))


@pytest.mark.parametrize("size_bytes", [1000, None])
@pytest.mark.parametrize("sent", [b"", b"x" * 999, b"x" * 999 + b"y", b"x" * 1001, b"y" * 5000])
def test_wrong_bytes_never_get_the_name(store: Store, size_bytes: int | None, sent: bytes) -> None:
    digest = Digest.of(b"x" * 1000)
    asked: list[int] = []

    def chunks(start: int) -> Iterator[bytes]:
        asked.append(start)
        return (sent[at : at + 100] for at in range(start, len(sent), 100))

    with pytest.raises(DigestMismatch) as caught:
        store.blobs.receive(digest, size_bytes, chunks, moved=lambda count: None)
    assert digest in caught.value.expected
    assert asked == [0]
    assert not store.blobs.has(digest)
    assert list((store.root / "tmp" / "partial").iterdir()) == []


def test_too_many_bytes_are_refused_at_once_and_the_stream_is_closed(store: Store) -> None:
    taken = 0
    closed: list[bool] = []

    def endless() -> Iterator[bytes]:
        nonlocal taken
        try:
            for _ in range(1000):
                taken += 100
                yield b"x" * 100
        finally:
            closed.append(True)

    stream = endless()  # held here, so that nobody but the receiver can have closed it
    with pytest.raises(DigestMismatch, match="error") as caught:
        store.blobs.receive(Digest.of(b"x" * 1000), 1000, lambda start: stream, moved=lambda count: None)
    assert caught.value.found == "more than 1000 bytes"
    assert taken == 1100
    assert closed == [True]


def test_what_came_before_a_failure_is_kept_and_the_stream_is_closed(store: Store) -> None:
    data = os.urandom(1000)
    digest = Digest.of(data)
    closed = []

    def breaking(start: int) -> Iterator[bytes]:
        try:
            yield data[start : start + 400]
            raise RemoteFailure("broke off")
        finally:
            closed.append(start)

    for expected in (400, 800):
        with pytest.raises(RemoteFailure):
            store.blobs.receive(digest, 1000, breaking, moved=lambda count: None)
        assert (store.root / "tmp" / "partial" / digest.hex).stat().st_size == expected
    with pytest.raises(RemoteFailure):
        store.blobs.receive(digest, 1000, breaking, moved=lambda count: None)
    store.blobs.receive(digest, 1000, lambda start: iter([data[start:]]), moved=lambda count: None)
    assert closed == [0, 400, 800]
    assert store.blobs.read(digest) == data


def test_a_damaged_blob_in_the_way_goes_to_quarantine(store: Store) -> None:
    data = os.urandom(1000)
    digest = store.blobs.put_bytes(data)
    path = store.blobs.path(digest)
    path.chmod(0o644)
    path.write_bytes(b"damaged")
    store.blobs.receive(digest, 1000, lambda start: iter([data[start:]]), moved=lambda count: None)
    assert store.blobs.is_whole(digest, full=True)
    assert [aside.read_bytes() for aside in (store.root / "quarantine").iterdir()] == [b"damaged"]


def test_two_receivers_of_one_blob_take_turns(store: Store) -> None:
    """The second waits for the first, and finds the blob: nothing comes twice."""
    data = os.urandom(1000)
    digest = Digest.of(data)
    entered, proceed = threading.Event(), threading.Event()
    asked: list[str] = []

    def first(start: int) -> Iterator[bytes]:
        asked.append("first")
        yield data[:500]
        entered.set()
        assert proceed.wait(30)
        yield data[500:]

    def second(start: int) -> Iterator[bytes]:
        asked.append("second")
        return iter([data[start:]])

    def receive(chunks: Callable[[int], Iterator[bytes]]) -> None:
        store.blobs.receive(digest, 1000, chunks, moved=lambda count: None)

    threads = [threading.Thread(target=receive, args=[first])]
    threads[0].start()
    assert entered.wait(30)
    threads.append(threading.Thread(target=receive, args=[second]))
    threads[1].start()
    while not _is_waited_for(store.root / "tmp" / "partial" / digest.hex):
        assert threads[1].is_alive()
    proceed.set()
    for thread in threads:
        thread.join(30)
    assert asked == ["first"]
    assert store.blobs.read(digest) == data
    assert list((store.root / "tmp" / "partial").iterdir()) == []


def _is_waited_for(path: Path) -> bool:
    """Whether the kernel knows somebody who waits for the lock of this file."""
    inode = path.stat().st_ino
    rows = Path("/proc/locks").read_text().splitlines()
    return any("->" in row and f":{inode} " in row for row in rows)


def test_a_finished_file_of_a_killed_run_is_read_only_and_taken_as_it_is(tmp_path: Path, store: Store) -> None:
    data = os.urandom(1000)
    digest = Digest.of(data)
    folder = store.root / "tmp" / "partial"
    folder.mkdir(parents=True)
    (folder / digest.hex).write_bytes(data)
    (folder / digest.hex).chmod(0o444)

    def never(start: int) -> Iterator[bytes]:
        raise AssertionError("nothing is missing")

    store.blobs.receive(digest, 1000, never, moved=lambda count: None)
    assert store.blobs.read(digest) == data


def test_a_disk_that_lost_bytes_is_noticed(tmp_path: Path) -> None:
    """The last check before the name: what the file has is what was written."""
    data = os.urandom(1000)
    path = tmp_path / "partial"

    def chunks(start: int) -> Iterator[bytes]:
        yield data[:600]
        os.truncate(path, 100)
        yield data[600:]

    class Nowhere:
        def is_done(self) -> bool:
            return False

        def put(self, path: Path) -> None:
            raise AssertionError("a file that is too short was handed on")

    with pytest.raises(OSError, match="Input/output"):
        complete(path, Wanted(Digest.of(data), 1000, "here"), chunks, moved=lambda count: None, place=Nowhere())
    assert not path.exists()
