"""The near end of a transfer: the local blob that is sent, and the words for what is wrong with it.

Place in the path: under each remote's `upload`.
Invariants: trouble with the local disk is never reported as the remote's.

Example:
    for data in local_chunks(source, 0): ...
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from vpstore.errors import BlobMissing, DigestMismatch, RemoteFailure, VpstoreError
from vpstore.schema.digest import Digest
from vpstore.storage import atomic
from vpstore.storage.partial import Wanted


def local_size(source: Path) -> int:
    """The size of the blob in bytes.

    Raises:  BlobMissing.
    """
    try:
        return source.stat().st_size
    except FileNotFoundError:
        raise _missing(source) from None
    except OSError as error:
        raise _unreadable(source, error) from error


def local_chunks(source: Path, start: int, *, size: int = atomic.CHUNK) -> Iterator[bytes]:
    """The blob's bytes from `start` on, in pieces of `size`, the last one shorter.

    Raises:  BlobMissing, VpstoreError: the local disk fails.
    """
    try:
        with source.open("rb") as file:
            file.seek(start)
            while data := file.read(size):
                yield data
    except FileNotFoundError:
        raise _missing(source) from None
    except OSError as error:
        raise _unreadable(source, error) from error


def local_mismatch(source: Path, wanted: Wanted) -> Wanted:
    """The same wish, with the words for a damaged local blob."""
    return replace(
        wanted,
        where=f"{source}, on its way to {wanted.where}",
        what="a local blob does not match its digest: this blob was not uploaded",
        next_step="vpstore repair",
    )


def damaged(source: Path, label: str, digest: Digest, *, found: str) -> DigestMismatch:
    """The error for a local blob that is not what it should be."""
    return local_mismatch(source, Wanted(digest, None, where=label)).mismatch(found)


def absent(label: str, name: str) -> BlobMissing:
    """The error for an object that a remote does not have."""
    return BlobMissing(
        "the remote does not hold an object",
        where=f"{label}: {name}",
        next_step="`vpstore push` from the machine that has it",
    )


def oversized(label: str, name: str, limit: int) -> RemoteFailure:
    """The error for a small object that is not small."""
    return RemoteFailure(
        "an object is larger than it can be",
        where=f"{label}: {name}",
        expected=f"at most {limit} bytes",
        found="more",
        next_step="somebody put something else there: remove it there, then `vpstore push`",
    )


def _missing(source: Path) -> BlobMissing:
    return BlobMissing(
        "the store does not hold a blob", where=str(source), next_step="vpstore repair, or build the object again"
    )


def _unreadable(source: Path, error: OSError) -> VpstoreError:
    return VpstoreError(
        f"reading a local blob failed: {os.strerror(error.errno or 0)}",
        where=str(source),
        next_step="look at the disk that holds the store",
    )
