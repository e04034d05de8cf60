"""Readings: what the bytes of a chain's blobs were found to be.

Place in the path: the first step of an audit; everything that is held against bytes asks here.
Invariants: no stamp, mode or time is trusted, and none is written; a blob is read once for its digest however many
artifacts share it, and shards once more for the digests of their tensors.

Example:
    readings = Readings(store, progress); readings.read(digests); readings.fault(digest)
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

from vpstore.errors import VpstoreError
from vpstore.schema.digest import Digest
from vpstore.schema.tensor_table import TensorTable
from vpstore.storage import hashing
from vpstore.storage.refusals import refusal
from vpstore.storage.store import Store
from vpstore.storage.tables import read_table

Progress = Callable[[str, int, int], None]
MISSING = "missing"


class Readings:
    """Every blob that was read, and what came of it."""

    def __init__(self, store: Store, progress: Progress) -> None:
        self._store, self._progress = store, progress
        self._faults: dict[Digest, str] = {}
        self._sizes: dict[Digest, int] = {}
        self._tables: dict[Digest, TensorTable | str] = {}
        self._sha256: dict[Digest, str] = {}
        self.read_bytes = 0

    def __len__(self) -> int:
        return len(self._faults)

    def read(self, digests: Iterable[Digest]) -> None:
        """Digest blobs that were not read yet."""
        wanted = []
        for digest in sorted(set(digests) - self._faults.keys()):
            if fault := _not_a_file(self.path(digest)):
                self._faults[digest] = fault
            else:
                wanted.append(digest)
        results = hashing.digest_many([self.path(digest) for digest in wanted])
        for number, (digest, found) in enumerate(zip(wanted, results, strict=True)):
            self._progress("audit: blobs", number + 1, len(wanted))
            self.read_bytes += found.size_bytes
            self._sizes[digest] = found.size_bytes
            if found.error is not None:
                is_gone = isinstance(found.error, FileNotFoundError)
                self._faults[digest] = MISSING if is_gone else refusal(found.error)
            else:
                self._faults[digest] = "" if found.digest == digest else f"{found.digest}, {found.size_bytes} bytes"

    def read_tables(self, shards: Iterable[Digest]) -> None:
        """Derive the tensor tables of shards from their bytes."""
        wanted = sorted({digest for digest in shards if not self.fault(digest)} - self._tables.keys())
        results = hashing.in_threads(self._table_of, wanted, workers=hashing.cores())
        for number, (digest, table) in enumerate(zip(wanted, results, strict=True)):
            self._tables[digest] = table
            self._progress("audit: tensors", number + 1, len(wanted))

    def path(self, digest: Digest) -> Path:
        """Where a blob lies."""
        return self._store.blobs.path(digest)

    def fault(self, digest: Digest) -> str:
        """What is wrong with a blob, "" if nothing; one that was not asked for before is read now."""
        if digest not in self._faults:
            self.read([digest])
        return self._faults[digest]

    def table(self, shard: Digest) -> TensorTable | str:
        """The table of a whole shard as its bytes give it, or why there is none."""
        if shard not in self._tables:
            self.read_tables([shard])
        return self._tables[shard]

    def sha256(self, digest: Digest) -> str:
        """The SHA-256 of a whole blob, in hex, or why there is none."""
        if digest not in self._sha256:
            try:
                self._sha256[digest] = self._read_sha256(digest)
            except OSError as error:
                self._sha256[digest] = f"unreadable: {error.strerror}"
        return self._sha256[digest]

    def size_bytes(self, digest: Digest) -> int:
        """The size of a blob that was read."""
        return self._sizes[digest]

    def _read_sha256(self, digest: Digest) -> str:
        state = hashlib.sha256()
        with self.path(digest).open("rb", buffering=0) as source:
            for window in hashing.windows(source):
                state.update(window)
        return state.hexdigest()

    def _table_of(self, shard: Digest) -> TensorTable | str:
        try:
            return read_table(self.path(shard), where=shard)
        except (VpstoreError, OSError) as error:
            return error.what if isinstance(error, VpstoreError) else str(error)


def _not_a_file(path: Path) -> str:
    """Why a blob's name is not that of a file of its own, "" if it is; a pipe would never end, a link leads away."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return MISSING
    except OSError as error:
        return refusal(error)
    return "" if stat.S_ISREG(mode) else "a symbolic link" if stat.S_ISLNK(mode) else "not a file"
