"""S3 and what speaks its protocol, as a remote.

Place in the path: `dvc.open_remote` opens it with the s3fs file system of the DVC remote, so that DVC's endpoint,
profile, credentials, encryption and timeouts hold here too. Calls go straight to the protocol's operations: a file
system's view of them hides which range came, and begins a killed upload again from nothing.
Invariants: what came is the range that was asked for, by status, Content-Range and length, or it is no answer; an
object appears by one PUT whose bytes were digested before, or by the completion of an upload whose bytes were digested
while they were sent; listings are never taken from a cache.

Example:
    remote = S3Remote(fs, "bucket/models", "origin (s3://bucket/models)")
    for data in remote.chunks(blob_name(digest), start=1 << 20): ...
"""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from vpstore.schema.digest import Digest
from vpstore.storage.remotes.base import Moved
from vpstore.storage.remotes.failures import Broken, Link, Patience
from vpstore.storage.remotes.local import absent, damaged, local_chunks, local_size, oversized
from vpstore.storage.remotes.s3_calls import S3Calls, error_code
from vpstore.storage.remotes.s3_upload import Multipart

PART: Final = 8 << 20  # bytes; also the largest blob that goes over in one request
_PIECE: Final = 4 << 20  # bytes handed on at a time
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_NO_RANGE: Final = ("InvalidRange", "416")


class S3Remote:
    """One prefix of one bucket, as a remote."""

    lists = True

    def __init__(
        self, fs: Any, root: str, label: str, *, patience: Patience | None = None, part_size: int = PART
    ) -> None:
        """Use an s3fs file system.

        Args:    root: bucket and prefix; part_size: of multipart uploads, in bytes; deterministic, so that a later run
                 finds its own parts.
        """
        self.label = label
        self._link = Link(label, patience or Patience())
        self._calls = S3Calls(fs, root, self._link)
        self._part_size = part_size

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Every object below a folder, in the order of names, a page at a time."""
        start = self._calls.key(prefix)
        token: dict[str, str] = {}
        while True:
            try:
                page = self._calls("list_objects_v2", prefix, "listing", Prefix=start, **token)
            except FileNotFoundError as error:
                raise self._absent(prefix, error) from error
            for row in page.get("Contents", ()):
                yield self._calls.name(row["Key"]), int(row["Size"])
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def size(self, name: str) -> int | None:
        """The size of one object, or None."""
        with suppress(FileNotFoundError):
            return int(self._calls("head_object", name, "looking", Key=self._calls.key(name))["ContentLength"])
        return None

    def read(self, name: str, *, limit: int) -> bytes:
        """A small object, whole."""
        data = bytearray()
        for piece in self.chunks(name):
            data += piece
            if len(data) > limit:
                raise oversized(self.label, name, limit)
        return bytes(data)

    def chunks(self, name: str, *, start: int = 0) -> Iterator[bytes]:
        """The bytes from `start` on, over as many connections as it takes."""
        reading = _Reading(self._calls, self._calls.key(name))
        try:
            yield from self._link.resumed(name, start, reading.stream)
        except FileNotFoundError as error:
            raise self._absent(name, error) from error

    def write(self, name: str, data: bytes) -> None:
        """Put a small object."""
        md5 = b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        try:
            self._calls("put_object", name, "writing", Key=self._calls.key(name), Body=data, ContentMD5=md5)
        except FileNotFoundError as error:
            raise self._absent(name, error) from error

    def upload(self, name: str, source: Path, digest: Digest, *, moved: Moved) -> None:
        """Put a blob: in one request if it is small, else in parts that outlive this process."""
        if local_size(source) > self._part_size:
            try:
                Multipart(self._calls, name, self._part_size).upload(source, digest, moved=moved)
            except FileNotFoundError as error:
                raise self._absent(name, error) from error
            return
        data = b"".join(local_chunks(source, 0))
        found = Digest.of(data)
        if found != digest:
            raise damaged(source, self.label, digest, found=f"{found}, {len(data)} bytes")
        self.write(name, data)
        moved(len(data))

    def remove(self, name: str) -> None:
        """Remove an object if it is there."""
        with suppress(FileNotFoundError):
            self._calls("delete_object", name, "removing", Key=self._calls.key(name))

    def _absent(self, name: str, error: FileNotFoundError) -> Exception:
        if error_code(error) == "NoSuchBucket":
            return self._link.failure(
                name,
                "there is no such bucket",
                found=self._calls.bucket,
                next_step="make the bucket, or put the URL right with `dvc remote modify NAME url`",
            )
        return absent(self.label, name)


class _Reading:
    """One object while it is read, over all its connections."""

    def __init__(self, calls: S3Calls, key: str) -> None:
        self._calls, self._key = calls, key
        self._seen: tuple[str, int] | None = None  # ETag and size of the first answer

    def stream(self, start: int) -> Iterator[bytes]:
        """The bytes from `start` on, over one connection.

        Raises:  Broken: the answer is not the range that was asked for, or ends early; what s3fs raises.
        """
        try:
            answer = self._calls.once("get_object", Key=self._key, Range=f"bytes={start}-")
        except OSError as error:
            if error_code(error) in _NO_RANGE:  # at the end, or beyond it
                return
            raise
        body = answer["Body"]
        try:
            skip, total = self._range(answer, start)
            yield from self._body(body, skip, total - start)
        finally:
            self._calls.fs.loop.call_soon_threadsafe(body.close)

    def _range(self, answer: Any, start: int) -> tuple[int, int]:
        """How many bytes come before the wanted ones, and the object's size."""
        status, length = answer["ResponseMetadata"]["HTTPStatusCode"], answer["ContentLength"]
        if status == 200:  # the whole object, whatever was asked for
            skip, total = start, int(length)
        else:
            match = _RANGE.fullmatch(answer.get("ContentRange") or "")
            first, last, total = (int(group) for group in match.groups()) if match else (-1, -1, -1)
            if status != 206 or (first, last + 1, length) != (start, total, total - start):
                raise Broken(
                    "another range than the one asked for",
                    expected=f"status 206, bytes {start}- to the end",
                    found=f"status {status}, {answer.get('ContentRange')}, length {length}",
                )
            skip = 0
        seen = (str(answer.get("ETag")), total)
        if self._seen not in (None, seen):
            raise Broken("the object changed while it was read", expected=str(self._seen), found=str(seen))
        self._seen = seen
        return skip, total

    def _body(self, body: Any, skip: int, wanted: int) -> Iterator[bytes]:
        left = wanted
        while left > 0:
            data, error = self._calls.wait(_gathered(body, min(_PIECE, skip + left)))
            came = len(data)
            data, skip = data[skip:], max(0, skip - came)
            left -= len(data)
            if data:
                yield data
            if error is not None:
                raise error
            if not came:
                raise Broken("the answer ended early", expected=f"{wanted} bytes", found=f"{wanted - left} bytes")


async def _gathered(body: Any, count: int) -> tuple[bytes, Exception | None]:
    """Up to `count` bytes; fewer only at the end, or before a failure, which is returned with them."""
    left = count
    pieces: list[bytes] = []
    while left:
        try:
            data = await body.read(left)
        except Exception as error:
            return b"".join(pieces), error
        if not data:
            break
        pieces.append(data)
        left -= len(data)
    return b"".join(pieces), None
