"""The matrix of remote faults: every fault, at several places, once and every time, in both directions.

`rows(...)` tries them against a real S3 server behind the proxy and counts what was tried, how it ended, and how often
wrong bytes were accepted, which must be never.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_proxy import Fault, FaultProxy
from remote_places import PART, S3Server

from vpstore.errors import DigestMismatch, RemoteFailure, VpstoreError
from vpstore.schema.digest import Digest
from vpstore.storage.remotes.base import blob_name
from vpstore.storage.remotes.failures import Patience
from vpstore.storage.remotes.s3 import S3Remote
from vpstore.storage.stamps import Stamps
from vpstore.storage.store import Store

SIZE = 5 * PART + 17
TIMEOUT = 0.5  # seconds of silence, where silence is the fault; elsewhere a busy machine is not a fault
PATIENCE = Patience(attempts=2, pause_seconds=0.001)
SILENT = ("silence", "slow")

PLACES: tuple[float, ...] = (0, 1, PART, 0.5, -1)
ONE: tuple[float, ...] = (0.5,)
DOWNLOADS: dict[str, tuple[float, ...]] = {
    "reset": PLACES,
    "short": PLACES,
    "too-short": PLACES,
    "too-long": ONE,
    "shifted": ONE,
    "shifted-silently": ONE,
    "from-the-start": ONE,
    "200-whole": ONE,
    "200-range": ONE,
    "stale": ONE,
    "flipped": PLACES,
    "empty": ONE,
    "chunked": (1, 0.5, 1.0),
    "page": ONE,
    "silence": ONE,
    "slow": (0, 0.5),
    "hang-up": ONE,
    "500": ONE,
    "503": ONE,
    "403": ONE,
}
UPLOADS: dict[str, tuple[tuple[str, ...], tuple[float, ...]]] = {
    "reset": (("put", "part"), (0, 1, 0.5, -1)),
    "flipped-request": (("put", "part"), (0, 0.5, -1)),
    "lost": (("put", "create", "part", "complete", "abort"), ONE),
    "500-after": (("put", "create", "part", "complete"), ONE),
    "500": (("put", "create", "part", "complete", "uploads"), ONE),
    "503": (("put", "part", "complete"), ONE),
    "403": (("put", "part", "complete", "uploads"), ONE),
    "page": (("create", "uploads", "complete"), ONE),
    "silence": (("put", "part"), ONE),
}


@dataclass
class Row:
    """What became of one fault."""

    fault: str
    tried: int = 0
    arrived: int = 0  # the right bytes, in spite of it
    refused: int = 0  # a RemoteFailure or DigestMismatch
    wrong: int = 0  # wrong bytes under a final name

    def count(self, *, is_right: bool, is_wrong: bool) -> None:
        self.tried += 1
        self.arrived += is_right
        self.refused += not is_right
        self.wrong += is_wrong


class Field:
    """A bucket behind the proxy, and a store in front of it."""

    def __init__(self, folder: Path, server: S3Server, proxy: FaultProxy, files: Mapping[bool, Any]) -> None:
        """Lay it out; `files` are s3fs file systems: one that waits, and one that does not wait long (True)."""
        self.server, self.proxy, self.folder = server, proxy, folder
        self.bucket = server.bucket()
        self.store = Store.create(folder / "store", stamps=Stamps(folder / "stamps"))
        self._files = files
        self.remote = self.open(PATIENCE)

    def open(self, patience: Patience, *, is_hasty: bool = False) -> S3Remote:
        """The remote, behind the proxy."""
        return S3Remote(self._files[is_hasty], f"{self.bucket}/m", "remote", patience=patience, part_size=PART)

    def arm(self, fault: Fault, *, attempts: int = PATIENCE.attempts) -> S3Remote:
        """From now on, this goes wrong; the remote that shall meet it."""
        self.proxy.arm(fault)
        patience = Patience(attempts, PATIENCE.pause_seconds)
        return self.open(patience, is_hasty=fault.kind in SILENT)

    def put(self, name: str, data: bytes) -> None:
        """Put an object past the proxy."""
        self.server.client.put_object(Bucket=self.bucket, Key=f"m/vpstore/{name}", Body=data)

    def got(self, name: str) -> bytes | None:
        """An object as it lies there."""
        return self.server.contents(self.bucket).get(f"m/vpstore/{name}")

    def empty(self) -> None:
        """Remove everything, also unfinished uploads."""
        client: Any = self.server.client
        for key in self.server.contents(self.bucket):
            client.delete_object(Bucket=self.bucket, Key=key)
        for row in client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", ()):
            client.abort_multipart_upload(Bucket=self.bucket, Key=row["Key"], UploadId=row["UploadId"])


def _tried(action: Callable[[], None]) -> bool:
    """Whether it went well; an error must be one of two, and say where and what next."""
    failure: VpstoreError | None = None
    try:
        action()
    except (RemoteFailure, DigestMismatch) as error:
        failure = error
    assert failure is None or (failure.where and failure.next_step)
    return failure is None


def download(
    field: Field, fault: Fault, *, left: int, size_known: bool, attempts: int = PATIENCE.attempts
) -> tuple[bool, bool]:
    """Pull one blob through the fault, with `left` bytes of it there from an earlier run.

    Returns: whether the right bytes arrived; whether wrong bytes lie under the name.
    """
    data = os.urandom(SIZE)
    digest = Digest.of(data)
    field.put(blob_name(digest), data)
    partial = field.store.root / "tmp" / "partial" / digest.hex
    if left:
        partial.parent.mkdir(exist_ok=True)
        partial.write_bytes(data[:left])
    remote = field.arm(fault, attempts=attempts)
    _tried(
        lambda: field.store.blobs.receive(
            digest,
            SIZE if size_known else None,
            lambda start: remote.chunks(blob_name(digest), start=start),
            moved=lambda count: None,
        )
    )
    assert field.proxy.hits, "the fault was not met"
    field.proxy.arm(None)
    path = field.store.blobs.path(digest)
    found = path.read_bytes() if path.exists() else None
    return found == data, found not in (None, data)


def upload(field: Field, fault: Fault, *, size: int, replacing: bytes | None = None) -> tuple[bool, bool]:
    """Push one blob through the fault.

    Args:    replacing: what lies under the name before.
    Returns: whether the right bytes arrived; whether wrong bytes, other than those before, lie under the name.
    """
    data = os.urandom(size)
    digest = Digest.of(data)
    name = blob_name(digest)
    source = field.folder / "source"
    source.write_bytes(data)
    if replacing is not None:
        field.put(name, replacing)
    remote = field.arm(fault)
    said = _tried(lambda: remote.upload(name, source, digest, moved=lambda count: None))
    field.proxy.arm(None)
    found = field.got(name)
    is_wrong = found not in (replacing, data) or (said and found != data)
    field.empty()
    return said and found == data, is_wrong


def downloads(kinds: Iterable[str], *, is_short: bool = False) -> Iterator[tuple[str, Fault, dict[str, Any]]]:
    """Every case of the way back; a short list has one place a fault, and no unknown sizes."""
    for kind in kinds:
        for at in ONE if is_short else DOWNLOADS[kind]:
            for times in (1, None):
                for left in (0, 2 * PART + 5):
                    for size_known in (True,) if is_short else (True, False):
                        fault = Fault(kind, at=at, times=times, older=os.urandom(SIZE))
                        yield kind, fault, {"left": left, "size_known": size_known}
        if kind == "stale" and not is_short:
            for length in (1, SIZE - 1, SIZE + 1):
                fault = Fault(kind, times=None, older=os.urandom(length))
                yield kind, fault, {"left": 0, "size_known": True}


def uploads(kinds: Iterable[str], *, is_short: bool = False) -> Iterator[tuple[str, Fault, dict[str, Any]]]:
    """Every case of the way there; a short list has one place a fault."""
    for kind in kinds:
        operations, places = UPLOADS[kind]
        for operation in operations:
            for at in ONE if is_short else places:
                for times in (1, None):
                    size = 1000 if operation == "put" else SIZE
                    replacing = b"older" if times is None else None
                    yield kind, Fault(kind, operation, at, times), {"size": size, "replacing": replacing}


def download_rows(field: Field, kinds: Iterable[str] = tuple(DOWNLOADS), *, is_short: bool = False) -> list[Row]:
    """Try every fault on the way back."""
    found: dict[str, Row] = {}
    for kind, fault, how in downloads(kinds, is_short=is_short):
        is_right, is_wrong = download(field, fault, **how)
        found.setdefault(kind, Row(f"download: {kind}")).count(is_right=is_right, is_wrong=is_wrong)
    return list(found.values())


def upload_rows(field: Field, kinds: Iterable[str] = tuple(UPLOADS), *, is_short: bool = False) -> list[Row]:
    """Try every fault on the way there."""
    found: dict[str, Row] = {}
    for kind, fault, how in uploads(kinds, is_short=is_short):
        is_right, is_wrong = upload(field, fault, **how)
        found.setdefault(kind, Row(f"upload: {kind}")).count(is_right=is_right, is_wrong=is_wrong)
    return list(found.values())


def table(rows: Iterable[Row]) -> str:
    """The counts, as documentation shows them."""
    lines = ["| fault | tried | right bytes arrived | refused | wrong accepted |", "|---|---|---|---|---|"]
    total = Row("all")
    for row in rows:
        lines.append(f"| {row.fault} | {row.tried} | {row.arrived} | {row.refused} | {row.wrong} |")
        for name in ("tried", "arrived", "refused", "wrong"):
            setattr(total, name, getattr(total, name) + getattr(row, name))
    lines.append(f"| **all** | {total.tried} | {total.arrived} | {total.refused} | {total.wrong} |")
    return "\n".join(lines)
