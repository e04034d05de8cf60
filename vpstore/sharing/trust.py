"""What of a remote's word is believed: which artifacts are vouched for, and which attestations come in.

Place in the path: pull and repair ask here before a claim or an attestation is written into the store, because the
build cache believes what the store has. Blobs need nobody's word: their digest is their proof.
Invariants: an artifact is vouched for by the lock of this checkout (under any profile) or by a trusted key's signature
of a build statement about it; of an artifact that only a signature vouches for, only what is signed comes in; key files
of a remote are never believed: the claim `key -> artifact` follows from the manifest of a vouched artifact.

Example:
    word = Trust.of(work).word(remote, artifact); word.is_vouched, word.files
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from vpstore.errors import BadManifest, BlobMissing, DigestMismatch
from vpstore.schema.attestation import Statement
from vpstore.schema.canonical import parse_canonical
from vpstore.schema.digest import Digest
from vpstore.schema.dsse import Envelope
from vpstore.schema.manifest import Manifest
from vpstore.schema.reproduction import PREDICATE_TYPE as REPRODUCED
from vpstore.schema.reproduction import Reproduction
from vpstore.signatures import TrustedKey, load_trusted_keys, signers_of
from vpstore.storage import atomic, beneath
from vpstore.storage.attestations import ENVELOPE_SUFFIX, SUFFIX
from vpstore.storage.remotes.base import Remote, attestations_prefix
from vpstore.storage.store import Store
from vpstore.workspace import Workspace

MAX_ATTESTATION_BYTES: Final = 4 << 20
MAX_ATTESTATIONS: Final = 1000  # of one artifact that are looked at; a remote may hold any number


@dataclass(frozen=True)
class Word:
    """What a remote says about one artifact, as far as it is believed."""

    is_vouched: bool
    files: dict[str, bytes] = field(default_factory=dict)  # name -> bytes, to be put beside the artifact's own
    refused: tuple[str, ...] = ()  # in words, for the person


@dataclass(frozen=True)
class Trust:
    """Who is believed in one checkout."""

    locked: frozenset[Digest]
    keys: tuple[TrustedKey, ...]

    @classmethod
    def of(cls, work: Workspace) -> Trust:
        """The lock's artifacts, of all profiles, and the trusted keys.

        Raises:  BadManifest: a damaged lock; UsageError: a trusted key that cannot be read.
        """
        profiles = work.checkout.lock().profiles.values()
        locked = frozenset(entry.artifact for entries in profiles for entry in entries.values())
        return cls(locked, load_trusted_keys(work.checkout))

    def word(self, remote: Remote, artifact: Digest) -> Word:
        """Read what a remote has under `attestations/<artifact>/`, and keep what may be believed.

        Raises:  RemoteFailure.
        """
        is_locked = is_vouched = artifact in self.locked
        bare: dict[str, bytes] = {}
        signed: dict[str, bytes] = {}
        refused = []
        for name, data in attestation_files(remote, artifact):
            try:
                statement, payload = read_attestation(name, data, artifact=artifact, where=remote.label)
                if not name.endswith(ENVELOPE_SUFFIX):
                    bare[name] = data
                elif self._signers(data, where=name):
                    # What was signed is as good without its envelope, and that is what the build cache reads.
                    signed |= {name: data, Digest.of(payload).hex + SUFFIX: payload}
                    is_vouched = is_vouched or isinstance(statement, Statement)
                elif is_locked:
                    bare[name] = data
            except (BadManifest, DigestMismatch) as error:
                refused.append(f"attestation {name[:12]}… of {artifact.short} on {remote.label}: {error.what}")
        if is_locked:
            return Word(True, {**bare, **signed}, tuple(refused))
        if dropped := sorted(set(bare) - set(signed)):
            refused.append(
                f"what {remote.label} attests of {artifact.short} is not taken ({len(dropped)} files): "
                "vpstore.lock does not name it and no trusted key signed them"
            )
        return Word(is_vouched, signed if is_vouched else {}, tuple(refused))

    def _signers(self, data: bytes, *, where: str) -> tuple[str, ...]:
        return signers_of(Envelope.decode(data, where=where), self.keys, where=where) if self.keys else ()


def attestation_files(remote: Remote, artifact: Digest) -> Iterator[tuple[str, bytes]]:
    """The files a remote has about an artifact, in the order of names.

    Raises:  RemoteFailure.
    """
    prefix = attestations_prefix(artifact)
    names = sorted(name.removeprefix(prefix) for name, size in remote.list(prefix) if size <= MAX_ATTESTATION_BYTES)
    for name in names[:MAX_ATTESTATIONS]:
        try:
            yield name, remote.read(prefix + name, limit=MAX_ATTESTATION_BYTES)
        except BlobMissing:  # removed since the listing
            continue


def read_attestation(name: str, data: bytes, *, artifact: Digest, where: str) -> tuple[Statement | Reproduction, bytes]:
    """One attestation in memory, held against its name and its subject, as the store holds its own.

    Returns: the statement, and its bytes without the envelope.
    Raises:  DigestMismatch, BadManifest.
    """
    stem, suffix = name[:64], name[64:]
    if suffix not in (SUFFIX, ENVELOPE_SUFFIX):
        raise BadManifest("not an attestation's name", where=f"{where}, {name[:100]}")
    if (found := Digest.of(data).hex) != stem:
        raise DigestMismatch("an attestation does not match its name", where=where, expected=stem, found=found)
    payload = Envelope.decode(data, where=where).payload if suffix == ENVELOPE_SUFFIX else data
    statement = _decode(payload, where)
    if statement.artifact != artifact:
        raise DigestMismatch(
            "an attestation is about another artifact", where=where, expected=artifact, found=statement.artifact
        )
    return statement, payload


def _decode(payload: bytes, where: str) -> Statement | Reproduction:
    document = parse_canonical(payload, where=where)
    is_reproduction = isinstance(document, dict) and document.get("predicateType") == REPRODUCED
    return (Reproduction if is_reproduction else Statement).decode(payload, where=where)


def missing_files(store: Store, manifest: Manifest, word: Word) -> list[tuple[str, bytes]]:
    """The attestations that are believed and not here: their names on a remote, and their bytes.

    A damaged one that is in the way is not among them: it is repair's.
    """
    folder, prefix = store.attestations.folder(manifest.digest), attestations_prefix(manifest.digest)
    return [(prefix + name, data) for name, data in sorted(word.files.items()) if not (folder / name).exists()]


def store_word(store: Store, manifest: Manifest, word: Word) -> None:
    """Write what is believed of one artifact that is whole here: its attestations, then its key."""
    folder = store.attestations.folder(manifest.digest)
    for name, data in missing_files(store, manifest, word):
        beneath.make_plain_directory(folder, store.attestations.root)
        atomic.write_file(folder / name.rpartition("/")[2], data, folder=store.blobs.tmp)
    if folder.is_dir():  # also what a process wrote that died before this
        atomic.fsync_up(folder, store.attestations.root)
    store_key(store, manifest, is_vouched=word.is_vouched)


def store_key(store: Store, manifest: Manifest, *, is_vouched: bool) -> None:
    """Claim that an artifact's key gave it, if it is vouched for and a sound attestation here says so."""
    key = manifest.build.key()
    if is_vouched and any(statement.key == key for statement in store.attestations.of(manifest.digest)):
        store.keys.add(key, manifest.digest)
