"""Blobs: write-once bytes, found by their digest.

Place in the path: under publish and resolve. A blob's name is its digest, so it can only be right or damaged; whether
it is right is found by reading, or by a stat stamp of an earlier reading.
Invariants: mode 0444; nothing is repaired while reading; a damaged blob in the way of a healthy one is moved to
quarantine, never deleted; two writers of one blob both succeed.

Example:
    digest = store.blobs.put_bytes(b"{}"); store.blobs.read(digest)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from vpstore.errors import BlobMissing, DigestMismatch
from vpstore.schema.canonical import MAX_BYTES
from vpstore.schema.digest import Digest
from vpstore.storage import atomic
from vpstore.storage.stamps import Stamps, Stat


@dataclass
class Blobs:
    """The blobs under one root."""

    root: Path  # <store>/blobs/blake3
    tmp: Path
    quarantine: Path
    stamps: Stamps
    _unstamped: list[tuple[Path, Stat, Digest]] = field(default_factory=list)

    def path(self, digest: Digest) -> Path:
        """Where the blob lies, whether or not it is there."""
        return self.root / digest.hex[:2] / digest.hex[2:]

    def has(self, digest: Digest) -> bool:
        """Whether a file of that name is there; says nothing about its bytes."""
        return self.path(digest).is_file()

    def all(self) -> Iterator[Digest]:
        """Every blob, in the order of digests."""
        for folder in sorted(path for path in self.root.iterdir() if path.is_dir() and len(path.name) == 2):
            for path in sorted(folder.iterdir()):
                if len(path.name) == 62:
                    yield Digest.from_hex(folder.name + path.name)

    def strays(self) -> Iterator[Path]:
        """Files under the root that have no blob's name."""
        for path in sorted(self.root.rglob("*")):
            if path.is_dir() and not path.is_symlink():
                continue
            if path.is_symlink() or len(path.name) != 62 or path.parent.parent != self.root:
                yield path

    def is_whole(self, digest: Digest, *, full: bool = False) -> bool:
        """Whether the blob is here and its bytes are its digest's; a valid stamp saves the reading unless `full`."""
        path = self.path(digest)
        if not full and self.stamps.holds(path, digest):
            return True
        try:
            self.check(digest)
        except (BlobMissing, DigestMismatch):
            return False
        return True

    def ensure(self, digest: Digest, *, what: str, full: bool = False) -> None:
        """As `is_whole`, but raise.

        Args:    what: what the blob is, for the error.
        Raises:  BlobMissing, DigestMismatch: naming it.
        """
        if full or not self.stamps.holds(self.path(digest), digest):
            self.check(digest, what=what)

    def check(self, digest: Digest, *, what: str = "") -> None:
        """Read the blob and compare; a good one is stamped, a bad one loses its stamps.

        Raises:  BlobMissing, DigestMismatch.
        """
        path = self.path(digest)
        try:
            before = Stat.of(path)
            found, size = atomic.digest_file(path)
        except FileNotFoundError:
            raise self._missing(digest, what) from None
        if found != digest:
            self.stamps.forget(path)
            raise DigestMismatch(
                "a blob does not match its digest",
                where=f"{what}, {path}" if what else str(path),
                expected=digest,
                found=f"{found}, {size} bytes",
                next_step="vpstore verify --all lists all damage; `vpstore build --force` the object makes it again",
            )
        if Stat.of(path) == before:
            self.stamps.record([(before, digest)])

    def open(self, digest: Digest) -> BinaryIO:
        """Open the blob's bytes as they are; verified by nobody.

        Raises:  BlobMissing.
        """
        try:
            return self.path(digest).open("rb")
        except FileNotFoundError:
            raise self._missing(digest, "") from None

    def read(self, digest: Digest, *, what: str = "") -> bytes:
        """The bytes of a small blob, verified as they are read.

        Raises:  BlobMissing, DigestMismatch.
        """
        with self.open(digest) as source:
            data = source.read(MAX_BYTES + 1)
        if Digest.of(data) != digest:
            self.check(digest, what=what)  # raises, with everything a person needs to know
        return data

    def put_bytes(self, data: bytes) -> Digest:
        """Store bytes; returns at once if a whole blob is already there."""
        digest = Digest.of(data)
        if not self.is_whole(digest):
            with atomic.TemporaryFile(self.tmp) as out:
                out.write(data)
                out.settle()
                self._place(out.path, digest)
        return digest

    def put_copy(self, source: Path) -> tuple[Digest, int]:
        """Store a copy of a file, digested while it is written."""
        with atomic.TemporaryFile(self.tmp) as out:
            with source.open("rb", buffering=0) as original:
                buffer = memoryview(bytearray(atomic.CHUNK))
                while count := original.readinto(buffer):
                    out.write(buffer[:count])
            if not self.is_whole(out.digest):
                out.settle()
                self._place(out.path, out.digest)
            return out.digest, out.size_bytes

    def take(self, source: Path, digest: Digest) -> None:
        """Make a file that was just digested a blob by renaming it; it must lie on the store's file system."""
        if self.is_whole(digest):
            atomic.remove(source)
            return
        atomic.make_read_only(source)
        atomic.fsync_file(source)
        self._place(source, digest)

    def stamp_written(self) -> None:
        """Stamp what this process wrote and nobody touched since; called when some time has passed."""
        settled = [(stat, digest) for path, stat, digest in self._unstamped if _stat(path) == stat]
        self._unstamped.clear()
        self.stamps.record(settled)

    def _place(self, source: Path, digest: Digest) -> None:
        target = self.path(digest)
        atomic.make_directory(target.parent)
        if target.exists():
            if self.is_whole(digest):  # another writer was faster
                atomic.remove(source)
                return
            aside = atomic.temporary_name(self.quarantine)
            atomic.keep_aside(target, aside.with_name(f"{digest.hex}-{aside.name}"))
        atomic.rename(source, target)
        self._unstamped.append((target, Stat.of(target), digest))

    def _missing(self, digest: Digest, what: str) -> BlobMissing:
        return BlobMissing(
            "the store does not hold a blob",
            where=what or str(self.path(digest)),
            expected=digest,
            next_step="build the object again, or set VPSTORE_ROOT to the store that has it",
        )


def _stat(path: Path) -> Stat | None:
    try:
        return Stat.of(path)
    except OSError:
        return None
