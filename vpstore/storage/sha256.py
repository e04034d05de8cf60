"""SHA-256 of blobs, for documents that the rest of the world reads.

Place in the path: `attest -o` names files by SHA-256, which is all that other tools know.
Invariants: each blob is read once and held against its own digest by the same reading, so that no SHA-256 is ever told
of bytes that are not the artifact's.

Example:
    found = sha256_of(store.blobs, {row.digest: row.path for row in manifest.files}, told=lambda done, total: None)
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Final

from blake3 import blake3

from vpstore.errors import DigestMismatch
from vpstore.schema.digest import Digest
from vpstore.storage.blobs import Blobs

_CHUNK: Final = 1 << 20  # stays in a core's cache while it is digested twice
_MAX_WORKERS: Final = 16


def sha256_of(blobs: Blobs, wanted: Mapping[Digest, str], *, told: Callable[[int, int], None]) -> dict[Digest, str]:
    """Read blobs in parallel, the largest first.

    Args:    wanted: what each blob is, for errors; told: called with the blobs done and their number, in this thread.
    Returns: the SHA-256 of each in hex.
    Raises:  BlobMissing, DigestMismatch.
    """
    found: dict[Digest, str] = {}
    largest_first = sorted(wanted, key=lambda digest: -_size(blobs.path(digest)))
    pool = ThreadPoolExecutor(max_workers=min(_MAX_WORKERS, os.cpu_count() or 1))
    try:
        running = {pool.submit(_read_once, blobs.path(digest)): digest for digest in largest_first}
        for task in as_completed(running):
            digest = running[task]
            # A missing or damaged blob is left to `check`, which reads it again and says all there is to say.
            pair = None if isinstance(task.exception(), FileNotFoundError) else task.result()
            if pair is None or pair[0] != digest:
                blobs.check(digest, what=wanted[digest])
                raise DigestMismatch("a blob changes while it is read", where=wanted[digest], expected=digest)
            found[digest] = pair[1]
            told(len(found), len(wanted))
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _read_once(path: Path) -> tuple[Digest, str]:
    own, other = blake3(), hashlib.sha256()
    with path.open("rb", buffering=0) as source:
        buffer = memoryview(bytearray(max(1, min(_CHUNK, os.fstat(source.fileno()).st_size))))
        while count := source.readinto(buffer):
            own.update(buffer[:count])
            other.update(buffer[:count])
    return Digest.from_hex(own.hexdigest()), other.hexdigest()
