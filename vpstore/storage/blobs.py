"""Blobs: write-once bytes, found by their digest.

Place in the path: under publish and resolve. A blob's name is its digest, so it can only be right or damaged; whether
it is right is found by reading, or by a stat stamp of an earlier reading.
Invariants: mode 0444 less the umask, whoever made the file; a plain file, never a link nor below one; nothing is
repaired while reading; a damaged blob in the way of a healthy one is moved to quarantine, never deleted; two writers of
one blob both succeed.

Example:
    digest = store.blobs.put_bytes(b"{}"); store.blobs.read(digest)
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from vpstore.errors import BlobMissing, BlobUnreadable, DigestMismatch
from vpstore.schema.canonical import MAX_BYTES
from vpstore.schema.digest import Digest, is_hex
from vpstore.storage import atomic, beneath, modes, partial
from vpstore.storage.blob_errors import missing, odd, refused
from vpstore.storage.stamps import Stamps, Stat


@dataclass
class Blobs:
    """The blobs under one root."""

    root: Path  # <store>/blobs/blake3
    tmp: Path
    quarantine: Path
    stamps: Stamps
    _unstamped: list[tuple[Path, Stat, Digest]] = field(default_factory=list)
    _found: set[Path] = field(default_factory=set)  # folders of blobs that are relied on though others wrote them

    def path(self, digest: Digest) -> Path:
        """Where the blob lies, whether or not it is there."""
        return self.root / digest.hex[:2] / digest.hex[2:]

    def has(self, digest: Digest) -> bool:
        """Whether a file of that name is there; says nothing about its bytes."""
        return self.path(digest).is_file() and not self.oddity(digest)

    def oddity(self, digest: Digest) -> str:
        """What lies in the blob's place if it is no plain file, or in its folder's; "" also if nothing does.

        Nothing is read or written through a link, and nothing is waited for that is a pipe.
        """
        path = self.path(digest)
        try:
            if stat.S_ISLNK(os.lstat(path.parent).st_mode):
                return "a symbolic link in the place of a folder"
            mode = os.lstat(path).st_mode
        except OSError:  # the one who reads says why
            return ""
        return "" if stat.S_ISREG(mode) else "a symbolic link" if stat.S_ISLNK(mode) else "no plain file"

    def all(self, *, refused: Callable[[OSError], None] | None = None) -> Iterator[Digest]:
        """Every blob, in the order of digests.

        Args:    refused: told of a folder that cannot be read, whose blobs are left out then; None: it is an error.
        """
        named = sorted(path for path in self.root.iterdir() if is_hex(path.name, 2))
        for folder in (path for path in named if path.is_dir() and not path.is_symlink()):
            try:
                inside = sorted(folder.iterdir())
            except OSError as error:
                if refused is None:
                    raise
                refused(error)
                continue
            for path in inside:
                if is_hex(path.name, 62) and not path.is_symlink():
                    yield Digest.from_hex(folder.name + path.name)

    def beginning(self, prefix: str) -> Iterator[Digest]:
        """The blobs whose hex digits begin with `prefix`, at least two of them."""
        for path in atomic.entries(self.root / prefix[:2]):
            if path.name.startswith(prefix[2:]) and is_hex(path.name, 62):
                yield Digest.from_hex(prefix[:2] + path.name)

    def strays(self) -> Iterator[Path]:
        """Files under the root that have no blob's name."""
        for path in sorted(self.root.rglob("*")):
            if path.is_dir() and not path.is_symlink():
                continue
            is_named = is_hex(path.name, 62) and is_hex(path.parent.name, 2) and path.parent.parent == self.root
            if path.is_symlink() or not is_named:
                yield path

    def is_whole(self, digest: Digest, *, full: bool = False) -> bool:
        """Whether the blob is here and its bytes are its digest's; a valid stamp saves the reading unless `full`.

        Raises:  BlobUnreadable: this user cannot know; no new one may take its place, as nothing says it is damaged.
        """
        path = self.path(digest)
        if not full and self.stamps.holds(path, digest) and not self.oddity(digest):
            return True
        try:
            self.check(digest)
        except BlobUnreadable:
            raise
        except (BlobMissing, DigestMismatch):
            return False
        return True

    def ensure(self, digest: Digest, *, what: str, full: bool = False) -> None:
        """As `is_whole`, but raise.

        Args:    what: what the blob is, for the error.
        Raises:  BlobMissing, DigestMismatch: naming it; as `check`.
        """
        if full or not self.stamps.holds(self.path(digest), digest) or self.oddity(digest):
            self.check(digest, what=what)

    def check(self, digest: Digest, *, what: str = "") -> None:
        """Read the blob and compare; a good one is stamped, a bad one loses its stamps.

        Raises:  BlobMissing, DigestMismatch; BlobUnreadable, which is one: this user may not read it.
        """
        path = self.path(digest)
        if oddity := self.oddity(digest):
            raise odd(path, digest, what, oddity)
        try:
            before = Stat.of(path)
            found, size = atomic.digest_file(path)
        except FileNotFoundError:
            raise missing(path, digest, what) from None
        except OSError as error:
            raise refused(path, digest, what, error) from error
        if found != digest:
            self.stamps.forget(path)
            raise odd(path, digest, what, f"{found}, {size} bytes", headline="a blob does not match its digest")
        if Stat.of(path) == before:
            self.stamps.record([(before, digest)])

    def open(self, digest: Digest, *, what: str = "") -> BinaryIO:
        """Open the blob's bytes as they are; verified by nobody.

        Raises:  BlobMissing, DigestMismatch: no plain file, or this user may not read it.
        """
        path = self.path(digest)
        if oddity := self.oddity(digest):
            raise odd(path, digest, what, oddity)
        try:
            return path.open("rb")
        except FileNotFoundError:
            raise missing(path, digest, what) from None
        except OSError as error:
            raise refused(path, digest, what, error) from error

    def read(self, digest: Digest, *, what: str = "") -> bytes:
        """The bytes of a small blob, verified as they are read.

        Raises:  BlobMissing, DigestMismatch.
        """
        with self.open(digest, what=what) as source:
            try:
                data = source.read(MAX_BYTES + 1)
            except OSError as error:
                raise refused(self.path(digest), digest, what, error) from error
        if Digest.of(data) != digest:
            self.check(digest, what=what)  # raises, with everything a person needs to know
        return data

    def find(self, digest: Digest) -> bool:
        """As `is_whole`, for a blob that something durable is about to name: `settle` makes its name durable, too."""
        if not self.is_whole(digest):
            return False
        self._found.add(self.path(digest).parent)
        return True

    def rely_on(self, digests: Iterable[Digest]) -> None:
        """Let `settle` make the names of these durable, too: something durable is about to name them."""
        self._found.update(self.path(digest).parent for digest in digests)

    def settle(self) -> None:
        """Make durable the names of what was found: its writer may have died between the rename and the fsync."""
        for folder in sorted(self._found):
            if folder.is_dir():
                atomic.fsync_directory(folder)
        self._found.clear()
        atomic.fsync_directory(self.root)

    def put_bytes(self, data: bytes) -> Digest:
        """Store bytes; returns at once if a whole blob is already there."""
        digest = Digest.of(data)
        if not self.find(digest):
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
            if not self.find(out.digest):
                out.settle()
                self._place(out.path, out.digest)
            return out.digest, out.size_bytes

    def take(self, source: Path, digest: Digest) -> None:
        """Make a file that was just digested a blob by renaming it; it must lie on the store's file system."""
        if self.find(digest):
            atomic.remove(source)
            return
        if not modes.become_blob(source, self.root):
            self.put_copy(source)
            atomic.remove(source)
            return
        try:
            atomic.fsync_file(source)
        except OSError:
            # The kernel may have dropped what it could not write and call the next fsync a success: compute it again.
            with suppress(OSError):
                atomic.remove(source)
            raise
        self._place(source, digest)

    def receive(
        self,
        digest: Digest,
        size_bytes: int | None,
        chunks: Callable[[int], Iterator[bytes]],
        *,
        moved: Callable[[int], None],
    ) -> None:
        """Store a blob that comes from elsewhere, taking up what a killed run left of it.

        Returns at once if a whole blob is already there; a damaged one goes to quarantine.

        Args:    size_bytes: as a manifest says it, None if unknown; chunks: the bytes from an offset on; moved: told of
                 each piece that came.
        Raises:  DigestMismatch: wrong bytes, also when read again from the start; nothing has appeared and nothing is
                 left. Whatever `chunks` raises; what came before is kept in `tmp/partial`.
        """
        if self.find(digest):
            return
        folder = self.tmp / "partial"
        atomic.make_directory(folder)
        wanted = partial.Wanted(digest, size_bytes, where=f"blob {digest}, on its way to {self.path(digest)}")
        partial.complete(folder / digest.hex, wanted, chunks, moved=moved, place=_Shelf(self, digest))

    def stamp_written(self) -> None:
        """Stamp what this process wrote and nobody touched since; called when some time has passed."""
        settled = [(stat, digest) for path, stat, digest in self._unstamped if _stat(path) == stat]
        self._unstamped.clear()
        self.stamps.record(settled)

    def _place(self, source: Path, digest: Digest) -> None:
        target = self.path(digest)
        beneath.make_plain_directory(target.parent, self.root)
        if os.path.lexists(target):
            if self.find(digest):  # another writer was faster
                atomic.remove(source)
                return
            aside = atomic.temporary_name(self.quarantine)
            atomic.keep_aside(target, aside.with_name(f"{digest.hex}-{aside.name}"))
        atomic.rename(source, target)
        self._unstamped.append((target, Stat.of(target), digest))


@dataclass(frozen=True)
class _Shelf:
    """The place of one blob that is being received."""

    blobs: Blobs
    digest: Digest

    def is_done(self) -> bool:
        return self.blobs.find(self.digest)

    def put(self, path: Path) -> None:
        if path.stat().st_mode & 0o222:  # another user began it: only the owner may change its mode
            self.blobs.put_copy(path)
            atomic.remove(path)
        else:
            self.blobs._place(path, self.digest)


def _stat(path: Path) -> Stat | None:
    try:
        return Stat.of(path)
    except OSError:
        return None
