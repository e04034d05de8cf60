"""Attestations and key files that are damaged or missing, mended from another copy or from what they follow from.

Place in the path: under repair, after an artifact's blobs. A damaged attestation's name is still the digest of what it
was: bytes with that digest are the same attestation, whoever has them. A key file follows from the manifest and a sound
attestation.
Invariants: a damaged file gets a second name in quarantine before another takes its own; an attestation that was never
here comes in only on the word of the lock or of a signature, as with pull; what no other copy could make right is set
aside: bytes that are what their name says and still no attestation of this artifact, an envelope with a false signature
of a trusted key, a claim that its artifact belies; so is a damaged attestation of which nobody has another copy, if a
sound one is left beside it.

Example:
    Claims(work, report, remote, trust).mend(manifest)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vpstore.errors import BadManifest, BlobMissing, DigestMismatch, VpstoreError
from vpstore.schema.digest import Digest, is_hex
from vpstore.schema.dsse import Envelope
from vpstore.schema.manifest import Manifest
from vpstore.sharing.advice import is_current, name_of
from vpstore.sharing.inspection import key_bytes
from vpstore.sharing.mending import MISSING, Repaired
from vpstore.sharing.trust import MAX_ATTESTATION_BYTES, Trust, missing_files, read_attestation
from vpstore.signatures import signers_of
from vpstore.storage import atomic
from vpstore.storage.attestations import ENVELOPE_SUFFIX
from vpstore.storage.refusals import read_plain
from vpstore.storage.remotes.base import Remote, attestations_prefix, key_name
from vpstore.storage.store import Store
from vpstore.workspace import Workspace


@dataclass(frozen=True)
class Claims:
    """What is said about artifacts in one store, and where other copies may be had."""

    work: Workspace
    report: Repaired
    source: Remote | None
    trust: Trust

    @property
    def store(self) -> Store:
        """The store that is mended."""
        return self.work.store

    def mend(self, manifest: Manifest) -> None:
        """Mend the attestations, then the key file of one artifact; having none is a fault, of an ancestor as well."""
        with atomic.disk_errors(self.store.root, f"mending what is said about {manifest.ref}"):
            self._mend_damaged(manifest)
            if not self.store.attestations.of(manifest.digest):
                self._fetch_missing(manifest)
            self._mend_key(manifest)

    def _mend_damaged(self, manifest: Manifest) -> None:
        for path in self.store.attestations.paths(manifest.digest):
            try:
                self.store.attestations.read(path)
            except VpstoreError as error:
                self._mend_one(manifest, path, error)
                continue
            try:
                self._mind_signature(path.name, path.read_bytes(), where=str(path))
            except DigestMismatch as error:  # under its own digest: every copy of it is the same forgery
                self._quarantine(manifest, path, error.what)

    def _mend_one(self, manifest: Manifest, path: Path, error: VpstoreError) -> None:
        found = error.found or error.what
        name = attestations_prefix(manifest.digest) + path.name
        if _is_past_mending(path):
            self._quarantine(manifest, path, f"{error.what}: {error.found}" if error.found else error.what)
        elif (data := self._other_copy(name, manifest)) is not None:
            self.report.add(str(manifest.ref), name, found=found, action="replaced")
            self._replace(path, data)
        elif not isinstance(error, (BadManifest, DigestMismatch)):  # this disk refuses: what lies there nobody knows
            self.report.failures.append(error)
        elif self.store.attestations.of(manifest.digest):
            step = f"nothing needs it; vpstore pull {manifest.ref} has it again from a remote that does"
            self._quarantine(manifest, path, found, step=step)
        else:
            self._lose(
                manifest, name, found, after=f"; then vpstore repair {name_of(self.work, manifest)} sets this one aside"
            )

    def _mind_signature(self, name: str, data: bytes, *, where: str) -> None:
        """Hold an envelope against the trusted keys.

        Raises:  DigestMismatch: a signature claims one of them and is not its own.
        """
        if name.endswith(ENVELOPE_SUFFIX) and self.trust.keys:
            signers_of(Envelope.decode(data, where=where), self.trust.keys, where=where)

    def _other_copy(self, name: str, manifest: Manifest) -> bytes | None:
        if self.source is None:
            return None
        try:
            data = self.source.read(name, limit=MAX_ATTESTATION_BYTES)
            read_attestation(name.rpartition("/")[2], data, artifact=manifest.digest, where=self.source.label)
            self._mind_signature(name, data, where=self.source.label)
        except (BlobMissing, DigestMismatch, BadManifest):
            return None
        return data

    def _fetch_missing(self, manifest: Manifest) -> None:
        """No sound attestation is left: take those that are believed."""
        word = None if self.source is None else self.trust.word(self.source, manifest.digest)
        coming = [] if word is None else missing_files(self.store, manifest, word)
        for name, data in coming:
            self.report.add(str(manifest.ref), name, found=MISSING, action="fetched")
            self._replace(self.store.attestations.folder(manifest.digest) / name.rpartition("/")[2], data)
        if not coming and not self._has_told(manifest):
            is_vouched = manifest.digest in self.trust.locked or (word is not None and word.is_vouched)
            step = "" if is_vouched else "`vpstore lock` where it was built lets its attestations come in; else "
            self._lose(manifest, attestations_prefix(manifest.digest), MISSING, step=step)

    def _mend_key(self, manifest: Manifest) -> None:
        key, artifact = manifest.build.key(), manifest.digest
        for other in atomic.entries(self.store.keys.folder(key)):
            if other.name != artifact.hex and (odd := self._odd_claim(other, key)):
                self._quarantine(manifest, other, odd)
        path = self.store.keys.folder(key) / artifact.hex
        is_there = path.is_file()
        if artifact in self.store.keys.artifacts(key):
            return
        name, found = key_name(key, artifact), "damaged" if is_there else MISSING
        is_coming = self.report.is_dry_run and self._has_told(manifest, mended=True)
        if is_coming or any(statement.key == key for statement in self.store.attestations.of(artifact)):
            self.report.add(str(manifest.ref), name, found=found, action="rewritten")
            self._replace(path, key_bytes(key, artifact))
        else:
            self._lose(manifest, name, found)

    def _odd_claim(self, path: Path, key: Digest) -> str:
        """What is wrong with a claim of another artifact under the same key, "" if nothing that can be told here."""
        try:
            _, artifact = self.store.keys.read(path)
        except (BadManifest, DigestMismatch) as error:
            return error.found or error.what
        except VpstoreError:
            return ""
        try:
            actual = self.store.manifest(artifact).build.key()
        except VpstoreError:
            return ""
        return "" if actual == key else f"a claim of an artifact whose key is {actual}"

    def _has_told(self, manifest: Manifest, *, mended: bool = False) -> bool:
        """Whether the report has an attestation of this artifact; with `mended`, one that is mended."""
        prefix = attestations_prefix(manifest.digest)
        actions = {row.action for row in self.report.rows if row.name.startswith(prefix)} - {"quarantined"}
        return bool(actions - {"lost"} if mended else actions)

    def _lose(self, manifest: Manifest, name: str, found: str, *, step: str = "", after: str = "") -> None:
        if not is_current(self.work, manifest.ref, manifest.digest):  # a build would attest another
            step += f"check out the config that made {manifest.digest.short}; there "
        step += f"vpstore build {manifest.ref} --force attests it anew{after}"
        self.report.add(str(manifest.ref), name, found=found, action="lost", next_step=step)

    def _replace(self, path: Path, data: bytes) -> None:
        """Write a file in the place of a damaged one, which keeps a name in quarantine."""
        if self.report.is_dry_run:
            return
        if os.path.lexists(path):
            atomic.keep_aside(path, self._aside(path))
        atomic.make_directory(path.parent)
        atomic.write_file(path, data, folder=self.store.blobs.tmp)

    def _quarantine(self, manifest: Manifest, path: Path, found: str, *, step: str = "") -> None:
        """Take a file that nobody should believe away, into quarantine."""
        name = path.relative_to(self.store.root).as_posix()
        self.report.add(str(manifest.ref), name, found=found, action="quarantined", next_step=step)
        if not self.report.is_dry_run:
            atomic.rename(path, self._aside(path))
            atomic.fsync_directory(path.parent)

    def _aside(self, path: Path) -> Path:
        aside = atomic.temporary_name(self.store.blobs.quarantine)
        return aside.with_name(f"{path.name}-{aside.name}")


def _is_past_mending(path: Path) -> bool:
    """Whether no other bytes belong under an attestation's name: these are the ones it means, or it means none."""
    if not is_hex(path.stem, 64):
        return True
    try:
        return Digest.of(read_plain(path, "reading an attestation")).hex == path.stem
    except VpstoreError:
        return False
