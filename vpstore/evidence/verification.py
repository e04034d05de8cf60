"""Verification: one run of reading a store again, blob by blob, and the list of what is not as it should be.

Place in the path: under verify, which says what is to be read and held against what.
Invariants: reads only; each blob once, however many artifacts share it, on all cores; a blob that cannot be read
is a fault like any other, and stops nothing.

Example:
    run = Verification(work); run.read_ahead(manifest.blobs()); run.blob_fault(digest)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from vpstore.claims import Contradiction
from vpstore.schema.digest import Digest
from vpstore.schema.fault import Fault
from vpstore.signatures import TrustedKey, load_usable_keys
from vpstore.storage.hashing import Hashed, digest_many
from vpstore.storage.refusals import refusal
from vpstore.workspace import Workspace


@dataclass
class Verification:
    """One run: each blob is read once, however many artifacts share it."""

    work: Workspace
    is_quick: bool = False  # a valid stat stamp stands for reading a blob that nothing but its digest is wanted of
    faults: set[Fault] = field(default_factory=set)
    read_bytes: int = 0
    told: set[Path | Digest] = field(default_factory=set)  # key files, and attested artifacts, seen to under a ref
    _state: dict[Digest, str] = field(default_factory=dict)  # what is wrong with a blob, "" if nothing

    def read_ahead(self, digests: Iterable[Digest]) -> None:
        """Read blobs on all cores, so that `blob_fault` knows them."""
        blobs = self.work.store.blobs
        unread = [digest for digest in digests if digest not in self._state]
        self._state |= {digest: odd for digest in unread if (odd := blobs.oddity(digest))}
        wanted = {blobs.path(digest): digest for digest in unread if digest not in self._state}
        if self.is_quick:
            stamped = {path: digest for path, digest in wanted.items() if blobs.stamps.holds(path, digest)}
            self._state.update(dict.fromkeys(stamped.values(), ""))
            wanted = {path: digest for path, digest in wanted.items() if path not in stamped}
        sound = []
        for done, found in enumerate(digest_many(list(wanted))):
            self.work.narrator.progress("verify: blobs", done + 1, len(wanted))
            digest = wanted[found.path]
            self._state[digest] = _fault_of(found, digest)
            self.read_bytes += found.size_bytes
            if self._state[digest] and found.digest is not None:
                blobs.stamps.forget(found.path)
            elif not self._state[digest] and found.stat is not None:
                sound.append((found.stat, digest))
        blobs.stamps.record(sound)

    def blob_fault(self, digest: Digest) -> str:
        """Read one blob, unless it was read before.

        Returns: what is wrong with it, "" if nothing.
        """
        if digest not in self._state:
            self.read_ahead([digest])
        return self._state[digest]

    def add(self, where: str, *, expected: str, found: str, blob: str = "", tensor: str = "") -> None:
        """List a fault."""
        self.faults.add(Fault(where, expected, found, blob, tensor))

    def add_claim(self, where: str, claim: Contradiction) -> None:
        """List what a manifest says that is not true."""
        self.faults.add(Fault(f"{where}: {claim.what}", claim.expected, claim.found, claim.blob, is_claim=True))

    def refused(self, where: str, error: OSError) -> None:
        """List a file or folder that the operating system does not let this user read."""
        self.add(f"{where}: {error.filename}", expected="read access", found=refusal(error))

    @contextmanager
    def going_on(self, where: str) -> Iterator[None]:
        """A folder or a document that cannot be read is a fault, and what comes after it is verified all the same."""
        try:
            yield
        except OSError as error:
            self.refused(where, error)

    @cached_property
    def keys(self) -> tuple[TrustedKey, ...]:
        """The keys whose signatures are held against their envelopes; loaded at the first envelope."""
        return load_usable_keys(self.work.checkout, self.work.narrator)

    def sorted(self) -> tuple[Fault, ...]:
        """All faults, in a fixed order."""
        return tuple(sorted(self.faults))


def _fault_of(found: Hashed, digest: Digest) -> str:
    if isinstance(found.error, FileNotFoundError):
        return "missing"
    if found.error is not None:
        return refusal(found.error)
    return "" if found.digest == digest else f"{found.digest}, {found.size_bytes} bytes"
