"""One blob on its way from a remote into the store.

Place in the path: under pull and repair, over `Blobs.receive`, which verifies and resumes.
Invariants: a remote that sends without end is stopped, also where no manifest states the blob's size.

Example:
    crew.start(partial(receive, store, remote, digest, size_bytes=None, moved=crew.moved))
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from vpstore.errors import DigestMismatch
from vpstore.schema.canonical import MAX_BYTES
from vpstore.schema.digest import Digest
from vpstore.storage import atomic
from vpstore.storage.remotes.base import Moved, Remote, blob_name
from vpstore.storage.store import Store

MAX_UNSTATED_BYTES: Final = MAX_BYTES  # of a blob whose size no manifest states: tables and recipe files


def receive(store: Store, remote: Remote, digest: Digest, *, size_bytes: int | None, moved: Moved) -> None:
    """Fetch a blob; a damaged one that has its name goes to quarantine.

    Args:    size_bytes: as a manifest states it; None if none does.
    Raises:  BlobMissing, DigestMismatch: the remote has none, or a wrong one; RemoteFailure; VpstoreError: the disk.
    """

    def chunks(start: int) -> Iterator[bytes]:
        pieces = remote.chunks(blob_name(digest), start=start)
        return pieces if size_bytes is not None else _bounded(pieces, remote, digest, start)

    with atomic.disk_errors(store.root, "storing a blob"):
        store.blobs.receive(digest, size_bytes, chunks, moved=moved)


def _bounded(pieces: Iterator[bytes], remote: Remote, digest: Digest, start: int) -> Iterator[bytes]:
    count = start
    for piece in pieces:
        count += len(piece)
        if count > MAX_UNSTATED_BYTES:
            raise DigestMismatch(
                "a blob on the remote is larger than it can be",
                where=f"{remote.label}: {blob_name(digest)}",
                expected=f"at most {MAX_UNSTATED_BYTES} bytes",
                next_step="vpstore verify --remote",
            )
        yield piece
