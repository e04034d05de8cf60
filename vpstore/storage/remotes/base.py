"""What a remote must offer: the same few calls for a directory, S3, GS, Azure and SSH.

Place in the path: push, pull, repair and `verify --remote` speak only to this; `dvc` opens one for the project's own
DVC remotes. Names are relative to `<remote>/vpstore/`, with forward slashes, and lie as in a store:
`blobs/blake3/ab/<62 hex>`, `keys/ab/<key>/<artifact>`, `attestations/<artifact>/<file>`.
Invariants: nothing appears under its final name before all its bytes are there and right; a remote is not trusted:
whoever reads from it holds the bytes against a digest.

Example:
    remote.upload(blob_name(digest), path, digest, moved=bar.add)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Protocol

from vpstore.schema.digest import Digest

FOLDER: Final = "vpstore"  # below the root of the DVC remote
Moved = Callable[[int], None]  # told how many bytes went over since the last call


class Remote(Protocol):
    """One remote, open. Every call may be made from several threads at once.

    Every call raises RemoteFailure when the remote refuses, breaks off or answers nonsense, after the transport's own
    retries; it says which remote, which object, and what to do next.
    """

    label: str  # for messages: the remote's name and address, without credentials
    lists: bool  # whether listing a folder costs one question, and an object that is not listed is not there

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Every object whose name begins with `prefix` (a folder, ending with `/`), with its size in bytes."""

    def size(self, name: str) -> int | None:
        """The size of one object in bytes, or None if there is none."""

    def read(self, name: str, *, limit: int) -> bytes:
        """A small object, whole.

        Raises:  BlobMissing: there is none; RemoteFailure: it is larger than `limit` bytes.
        """

    def chunks(self, name: str, *, start: int = 0) -> Iterator[bytes]:
        """The bytes of an object from `start` on; none if that is its end or beyond.

        Whether an object ends where it should is for the caller to see: by its size and its digest.

        Raises:  BlobMissing: there is none; RemoteFailure: also if the range that came is not the one asked for.
        """

    def write(self, name: str, data: bytes) -> None:
        """Put a small object, whole or not at all, replacing what was there."""

    def upload(self, name: str, source: Path, digest: Digest, *, moved: Moved) -> None:
        """Put a blob, digesting the very bytes that are sent, and replacing what was there.

        `moved` is told of bytes that went over now, not of those that an earlier run had sent.

        An upload that was killed is taken up where it stood, if the remote can.

        Raises:  DigestMismatch: the local bytes are not the digest's; nothing has appeared.
        """

    def remove(self, name: str) -> None:
        """Remove an object if it is there."""


def blob_name(digest: Digest) -> str:
    """Where a blob lies on a remote."""
    return f"blobs/blake3/{digest.hex[:2]}/{digest.hex[2:]}"


def key_name(key: Digest, artifact: Digest) -> str:
    """Where a claim of the build cache lies on a remote."""
    return f"keys/{key.hex[:2]}/{key.hex}/{artifact.hex}"


def attestations_prefix(artifact: Digest) -> str:
    """The folder of the attestations of one artifact on a remote."""
    return f"attestations/{artifact.hex}/"
