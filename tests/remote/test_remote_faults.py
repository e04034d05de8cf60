"""Faults of networks and remotes: the right bytes arrive or an error says so; nothing wrong gets a name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_matrix import (
    DOWNLOADS,
    SILENT,
    SIZE,
    TIMEOUT,
    UPLOADS,
    Field,
    Row,
    download,
    download_rows,
    table,
    upload,
    upload_rows,
)
from fault_proxy import Fault, FaultProxy, Handler
from remote_places import PART, QUICK, S3Server, s3_files

from vpstore.errors import BlobMissing, RemoteFailure
from vpstore.schema.digest import Digest
from vpstore.storage import partial
from vpstore.storage.remotes.base import blob_name
from vpstore.storage.remotes.failures import PROGRESS, Broken, Link, Patience
from vpstore.storage.remotes.s3 import S3Remote, _Reading
from vpstore.storage.remotes.s3_calls import S3Calls


@pytest.fixture(scope="module")
def proxied(s3_server: S3Server) -> Iterator[tuple[FaultProxy, dict[bool, Any]]]:
    """The proxy, and two file systems that go through it: one that waits, and one that does not wait long."""
    with FaultProxy(s3_server.port) as proxy:
        yield proxy, {False: s3_files(proxy.endpoint), True: s3_files(proxy.endpoint, read_timeout=TIMEOUT)}


@pytest.fixture
def field(tmp_path: Path, s3_server: S3Server, proxied: tuple[FaultProxy, dict[bool, Any]]) -> Iterator[Field]:
    """A bucket and a store, and no fault yet."""
    proxied[0].arm(None)
    yield Field(tmp_path, s3_server, *proxied)
    proxied[0].arm(None)


@pytest.mark.parametrize("kind", sorted(DOWNLOADS))
def test_nothing_wrong_is_pulled(field: Field, kind: str) -> None:
    (row,) = download_rows(field, [kind], is_short=True)
    assert (row.tried, row.wrong) == (4, 0)
    assert row.arrived + row.refused == row.tried


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(UPLOADS))
def test_nothing_wrong_is_pushed(field: Field, kind: str) -> None:
    (row,) = upload_rows(field, [kind], is_short=True)
    assert (row.tried, row.wrong) == (2 * len(UPLOADS[kind][0]), 0)
    assert row.arrived + row.refused == row.tried


@pytest.mark.slow
def test_the_whole_matrix(field: Field) -> None:
    rows = [*download_rows(field), *upload_rows(field)]
    print(table(rows))
    assert all(row.wrong == 0 for row in rows)
    assert sum(row.tried for row in rows) > 300


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in sorted(DOWNLOADS) if kind != "403"])
def test_a_fault_that_passes_does_no_harm(field: Field, kind: str) -> None:
    """Met once, with nothing there before: the right bytes arrive all the same, except where the remote lies."""
    lies = {"shifted-silently", "from-the-start", "200-range", "stale", "flipped"}
    fault = Fault(kind, at=PART, older=os.urandom(SIZE))
    attempts = 8 if kind in SILENT else 2
    if kind not in lies:
        assert download(field, fault, left=0, size_known=True, attempts=attempts) == (True, False)
    # What was taken up from an earlier run is doubted first: then the bytes come again, from the start.
    assert download(field, fault, left=PART, size_known=True, attempts=attempts) == (True, False)


@pytest.mark.parametrize("operation", ["put", "create", "part", "complete", "uploads", "abort"])
@pytest.mark.parametrize("kind", ["500", "lost"])
def test_an_upload_goes_on_after_a_fault_that_passes(field: Field, kind: str, operation: str) -> None:
    fault = Fault(kind, operation, times=1)
    assert upload(field, fault, size=1000 if operation == "put" else SIZE) == (True, False)


@pytest.mark.parametrize("kind", ["lost", "500-after", "404-after"])
def test_a_completion_whose_answer_is_lost_sends_nothing_again(field: Field, tmp_path: Path, kind: str) -> None:
    """Asked again, some servers say yes, others that there is no such upload any more: then the object is looked at."""
    source = tmp_path / "source"
    source.write_bytes(os.urandom(SIZE))
    digest, went = Digest.of(source.read_bytes()), []
    field.proxy.arm(Fault(kind, "complete"))
    field.remote.upload(blob_name(digest), source, digest, moved=went.append)
    assert field.proxy.hits == 1
    assert sum(went) == SIZE
    assert sum(request.operation == "part" for request in field.proxy.requests) == 6
    assert field.got(blob_name(digest)) == source.read_bytes()
    assert field.server.pieces(field.bucket) == 0


@pytest.mark.parametrize("operation", ["part", "complete"])
def test_an_upload_that_somebody_else_ended_begins_anew_a_few_times(
    field: Field, tmp_path: Path, operation: str
) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(SIZE))
    digest = Digest.of(source.read_bytes())
    field.put(blob_name(digest), b"damaged")  # so that looking at the object tells nothing
    field.proxy.arm(Fault("404", operation))
    field.remote.upload(blob_name(digest), source, digest, moved=lambda count: None)
    assert field.got(blob_name(digest)) == source.read_bytes()
    field.put(blob_name(digest), b"damaged")
    field.proxy.arm(Fault("404", operation, times=None))
    with pytest.raises(RemoteFailure, match="somebody else ended this upload 3 times"):
        field.remote.upload(blob_name(digest), source, digest, moved=lambda count: None)
    assert field.got(blob_name(digest)) == b"damaged"


def test_the_whole_object_is_not_taken_for_a_range_of_it(field: Field) -> None:
    data = os.urandom(SIZE)
    field.put("keys/ab/x", data)
    field.proxy.arm(Fault("200-whole", times=None))
    assert b"".join(field.remote.chunks("keys/ab/x", start=PART + 1)) == data[PART + 1 :]
    assert field.proxy.hits == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["reset", "short", "too-short", "too-long", "page", "500", "silence"])
@pytest.mark.parametrize("times", [1, None])
def test_a_listing_is_whole_or_an_error(field: Field, kind: str, times: int | None) -> None:
    names = [f"keys/ab/{number:04d}" for number in range(12)]
    for name in names:
        field.put(name, b"{}")
    remote = field.arm(Fault(kind, "list", times=times), attempts=2 if times is None else 8)
    if times is None:
        with pytest.raises(RemoteFailure) as caught:
            list(remote.list("keys/"))
        assert caught.value.where == "remote: keys/"
    else:
        assert [name for name, _ in remote.list("keys/")] == names


@pytest.mark.parametrize("kind", ["page", "500", "403", "hang-up"])
def test_a_size_is_right_or_an_error(field: Field, kind: str) -> None:
    field.put("keys/ab/x", b"12345")
    field.proxy.arm(Fault(kind, "head", times=None))
    with pytest.raises(RemoteFailure):
        field.remote.size("keys/ab/x")
    if kind != "403":
        field.proxy.arm(Fault(kind, "head"))
        assert field.remote.size("keys/ab/x") == 5
        field.proxy.arm(Fault(kind, "head"))
        assert field.remote.size("keys/ab/y") is None


def test_a_refusal_is_not_asked_again_and_says_what_to_do(field: Field) -> None:
    field.put("keys/ab/x", b"12345")
    field.proxy.arm(Fault("403", times=None))
    with pytest.raises(RemoteFailure) as caught:
        field.remote.read("keys/ab/x", limit=10)
    assert field.proxy.hits == 1
    assert "credentials" in caught.value.next_step
    assert caught.value.where == "remote: keys/ab/x"
    assert "a fault on purpose" in caught.value.found


def test_reading_goes_on_at_the_byte_that_was_reached(field: Field) -> None:
    data = os.urandom(9 << 20)
    field.put("keys/ab/x", data)
    field.proxy.arm(Fault("short", at=6 << 20))
    assert b"".join(field.remote.chunks("keys/ab/x", start=7)) == data[7:]
    first, second = (int(request.range_header[len("bytes=") : -1]) for request in field.proxy.requests)
    assert first == 7
    # What the client had read of the first answer, but for its own buffer, is not asked for again.
    assert 7 + (4 << 20) <= second <= 7 + (6 << 20)


def test_an_object_that_changes_while_it_is_read_is_an_error(field: Field) -> None:
    field.put("keys/ab/x", os.urandom(9 << 20))
    field.proxy.arm(Fault("short", at=6 << 20))
    stream = field.remote.chunks("keys/ab/x")
    next(stream)
    field.put("keys/ab/x", os.urandom(9 << 20))
    with pytest.raises(RemoteFailure, match="changed while it was read"):
        list(stream)


def test_a_body_that_ends_early_is_noticed_whatever_the_client_library_does(field: Field) -> None:
    class EndsEarly:
        async def read(self, count: int) -> bytes:
            return b""

    reading = _Reading(S3Calls(field.server.files, field.bucket, Link("there")), "x")
    with pytest.raises(Broken, match="ended early"):
        list(reading._body(EndsEarly(), 0, 5))


def test_a_bucket_that_is_not_there(field: Field, tmp_path: Path) -> None:
    remote = S3Remote(field.server.files, "no-such-bucket/m", "nowhere", patience=QUICK, part_size=PART)
    for size in (10, SIZE):
        (tmp_path / "source").write_bytes(b"x" * size)
        with pytest.raises(RemoteFailure, match="no such bucket"):
            remote.upload("keys/x", tmp_path / "source", Digest.of(b"x" * size), moved=lambda count: None)
    with pytest.raises(RemoteFailure, match="no such bucket"):
        list(remote.list("keys/"))
    with pytest.raises(RemoteFailure, match="no such bucket"):
        remote.write("keys/x", b"")
    with pytest.raises((RemoteFailure, BlobMissing)):
        remote.read("keys/x", limit=1)


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    patience = Patience(attempts=2, pause_seconds=0.001)
    remote = S3Remote(s3_files("http://127.0.0.1:1"), "bucket/m", "nowhere", patience=patience)
    with pytest.raises(RemoteFailure, match="failed 2 times") as caught:
        list(remote.list("keys/"))
    assert caught.value.where == "nowhere: keys/"
    assert "127.0.0.1:1" in caught.value.found


def test_failures_are_counted_anew_after_progress_and_bounded_without() -> None:
    link = Link("there", Patience(attempts=3, pause_seconds=0))
    opened: list[int] = []

    def breaking(step: int) -> Callable[[int], Iterator[bytes]]:
        def stream(start: int) -> Iterator[bytes]:
            opened.append(start)
            if start < 10 * PROGRESS:
                yield bytes(step)
                raise ConnectionResetError("on purpose")

        return stream

    assert sum(map(len, link.resumed("x", 0, breaking(PROGRESS)))) == 10 * PROGRESS
    assert len(opened) == 11
    opened.clear()
    with pytest.raises(RemoteFailure, match="failed 3 times"):
        list(link.resumed("x", 0, breaking(PROGRESS - 1)))
    assert len(opened) == 3


def test_a_mistake_in_a_program_is_not_called_a_failure_of_the_remote() -> None:
    with pytest.raises(TypeError):
        Link("there").attempt("x", "reading", lambda: len(3))


def test_the_matrix_notices_a_receiver_that_does_not_check(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without the check of the digest, the same cases are accepted wrong."""
    kinds = ["shifted-silently", "stale", "flipped"]
    monkeypatch.setattr(partial.Digesting, "digest", property(lambda state: _Anything()))
    rows = {row.fault: row for row in download_rows(field, kinds, is_short=True)}
    assert all(rows[f"download: {kind}"].wrong for kind in kinds)


class _Anything(str):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = str.__hash__


def test_the_matrix_notices_an_uploader_that_does_not_check(field: Field) -> None:
    """The control of the way there: a proxy that does not hold bodies against Content-MD5 passes flipped bytes on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "stated", lambda handler: None)
        (row,) = upload_rows(field, ["flipped-request"], is_short=True)
    assert row.wrong


def test_the_table_adds_up() -> None:
    text = table([Row("a", 3, 2, 1, 0), Row("b", 4, 0, 4, 0)])
    assert text.splitlines()[-1] == "| **all** | 7 | 2 | 5 | 0 |"
    assert text.splitlines()[2] == "| a | 3 | 2 | 1 | 0 |"
