"""Multipart uploads to S3 that outlive the process that began them.

Place in the path: under `s3`. A blob is cut at fixed places, so a later run finds what an earlier one sent: the upload
of that key is looked up, its parts are listed, and a part is kept if its size is right and its ETag is the MD5 of our
bytes at that place. (Where a bucket is encrypted with keys of its own, ETags are no MD5: all parts go over again.)
Invariants: every byte of the blob is read and digested in this run, kept part or not; the upload is completed only if
the digest is the blob's, else it is aborted and nothing appears; no part is left behind by a finished or a refused
upload. Several machines may upload one blob at once: they share the parts.

Example:
    Multipart(calls, name, part_size).upload(path, digest, moved=bar.add)
"""

from __future__ import annotations

import errno
import hashlib
from base64 import b64encode
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vpstore.errors import DigestMismatch, RemoteFailure
from vpstore.schema.digest import Digest
from vpstore.storage.partial import Digesting
from vpstore.storage.remotes.base import Moved
from vpstore.storage.remotes.local import damaged, local_chunks, local_size
from vpstore.storage.remotes.s3_calls import S3Calls

MAX_PARTS: Final = 10_000
WINDOW: Final = 3  # parts of one blob on their way at once; each is in memory
_ROUNDS: Final = 3  # somebody else may complete or abort the same upload meanwhile
_MIB: Final = 1 << 20

Listed = dict[int, tuple[str, int]]  # part number -> ETag, size in bytes


class _Gone(Exception):
    """The upload is not there any more."""


@dataclass(frozen=True)
class _Part:
    """The bytes of one part."""

    number: int
    data: bytes
    md5: bytes


def part_size_for(size_bytes: int, part_size: int) -> int:
    """The size of the parts of a blob: the usual one, or what keeps the number of parts within the protocol's limit."""
    least = -(-size_bytes // MAX_PARTS)
    return part_size if least <= part_size else -(-least // _MIB) * _MIB


class Multipart:
    """The upload of one blob to one key."""

    def __init__(self, calls: S3Calls, name: str, part_size: int) -> None:
        self._calls, self._name, self._part_size = calls, name, part_size
        self._key = calls.key(name)

    def upload(self, source: Path, digest: Digest, *, moved: Moved) -> None:
        """Send what the remote lacks, and complete.

        Raises:  DigestMismatch: the local bytes are wrong; nothing has appeared. FileNotFoundError: there is no such
                 bucket. RemoteFailure: what was sent stays for the next run.
        """
        for _ in range(_ROUNDS):
            upload_id, listed = self._taken_up()
            try:
                tags = self._sent(upload_id, listed, source, digest, moved=moved)
                self._complete(upload_id, tags)
            except _Gone:
                continue
            except DigestMismatch:
                self._abort_all()
                raise
            self._abort_all()
            return
        raise self._calls.link.failure(
            self._name, f"somebody else ended this upload {_ROUNDS} times", next_step="run the command again later"
        )

    def _taken_up(self) -> tuple[str, Listed]:
        """The newest upload of this key with its parts, or a new one."""
        for upload_id in reversed(self._uploads()):
            with suppress(FileNotFoundError):
                return upload_id, dict(self._listed(upload_id))
        begun = self._calls("create_multipart_upload", self._name, "beginning an upload", Key=self._key)
        return str(begun["UploadId"]), {}

    def _uploads(self) -> list[str]:
        """The unfinished uploads of exactly this key, oldest first; none where they cannot be listed."""
        found: list[tuple[str, str]] = []
        marker: dict[str, str] = {}
        while True:
            try:
                page = self._calls(
                    "list_multipart_uploads", self._name, "listing unfinished uploads", Prefix=self._key, **marker
                )
            except RemoteFailure as error:
                cause = error.__cause__
                if isinstance(cause, PermissionError) or getattr(cause, "errno", 0) == errno.ENOSYS:
                    return []
                raise
            uploads = (row for row in page.get("Uploads", ()) if row["Key"] == self._key)
            found += [(str(row.get("Initiated", "")), str(row["UploadId"])) for row in uploads]
            if not page.get("IsTruncated"):
                return [upload_id for _, upload_id in sorted(found)]
            marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def _listed(self, upload_id: str) -> Iterator[tuple[int, tuple[str, int]]]:
        marker: dict[str, int] = {}
        while True:
            page = self._calls("list_parts", self._name, "listing parts", Key=self._key, UploadId=upload_id, **marker)
            for row in page.get("Parts", ()):
                yield int(row["PartNumber"]), (str(row["ETag"]).strip('"'), int(row["Size"]))
            if not page.get("IsTruncated"):
                return
            marker = {"PartNumberMarker": page["NextPartNumberMarker"]}

    def _sent(
        self, upload_id: str, listed: Listed, source: Path, digest: Digest, *, moved: Moved
    ) -> list[tuple[str, bytes]]:
        """Read and digest the whole blob, and send the parts that are not there.

        Returns: ETag and MD5 of each part, in order.
        """
        size = local_size(source)
        state = Digesting(size)
        tags: list[tuple[str, bytes] | Future[tuple[str, bytes]]] = []
        sending: deque[Future[tuple[str, bytes]]] = deque()
        with ThreadPoolExecutor(WINDOW, thread_name_prefix="s3-part") as pool:
            try:
                for number, data in enumerate(local_chunks(source, 0, size=part_size_for(size, self._part_size)), 1):
                    state.add(data)
                    part = _Part(number, data, hashlib.md5(data, usedforsecurity=False).digest())
                    if listed.get(number) == (part.md5.hex(), len(data)):
                        tags.append((part.md5.hex(), part.md5))
                        continue
                    if len(sending) == WINDOW:
                        sending.popleft().result()
                    sending.append(pool.submit(self._send, upload_id, part, moved))
                    tags.append(sending[-1])
                done = [tag.result() if isinstance(tag, Future) else tag for tag in tags]
            finally:
                pool.shutdown(cancel_futures=True)
        if state.digest != digest:
            raise damaged(source, self._calls.link.label, digest, found=f"{state.digest}, {state.size_bytes} bytes")
        return done

    def _send(self, upload_id: str, part: _Part, moved: Moved) -> tuple[str, bytes]:
        try:
            answer = self._calls(
                "upload_part",
                self._name,
                f"sending part {part.number}",
                Key=self._key,
                UploadId=upload_id,
                PartNumber=part.number,
                Body=part.data,
                ContentMD5=b64encode(part.md5).decode(),
            )
        except FileNotFoundError as error:
            raise _Gone from error
        except RemoteFailure as error:
            if self._was_ended(upload_id):  # some servers stumble over an upload that ends under their hands
                raise _Gone from error
            raise
        moved(len(part.data))
        return str(answer["ETag"]).strip('"'), part.md5

    def _was_ended(self, upload_id: str) -> bool:
        """Whether somebody else completed or aborted the upload; False where that cannot be told."""
        with suppress(RemoteFailure, FileNotFoundError):
            if upload_id in (uploads := self._uploads()):
                return False
            return bool(uploads) or bool(self._calls("head_object", self._name, "looking", Key=self._key))
        return False

    def _complete(self, upload_id: str, tags: list[tuple[str, bytes]]) -> None:
        parts = [{"PartNumber": number, "ETag": f'"{tag}"'} for number, (tag, _) in enumerate(tags, 1)]
        try:
            self._calls(
                "complete_multipart_upload",
                self._name,
                "completing an upload",
                Key=self._key,
                UploadId=upload_id,
                MultipartUpload={"Parts": parts},
            )
        except (FileNotFoundError, RemoteFailure) as error:
            if self._is_complete(tags):
                return
            if isinstance(error, FileNotFoundError) or self._was_ended(upload_id):
                raise _Gone from error
            raise

    def _is_complete(self, tags: list[tuple[str, bytes]]) -> bool:
        """Whether the object is there with these parts: completed by somebody else, or the answer was lost."""
        expected = f"{hashlib.md5(b''.join(md5 for _, md5 in tags), usedforsecurity=False).hexdigest()}-{len(tags)}"
        with suppress(FileNotFoundError):
            found = self._calls("head_object", self._name, "looking", Key=self._key)
            return str(found.get("ETag", "")).strip('"') == expected
        return False

    def _abort_all(self) -> None:
        """Leave no part behind: neither ours nor what older runs left under this key."""
        for upload_id in self._uploads():
            with suppress(FileNotFoundError):
                self._calls("abort_multipart_upload", self._name, "ending an upload", Key=self._key, UploadId=upload_id)
