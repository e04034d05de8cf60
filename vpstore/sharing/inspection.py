"""Reading a remote's objects back and saying what is wrong with each.

Place in the path: under `verify --remote`, which lists the faults, and `repair --to-remote`, which mends them.
Invariants: reads only; every byte is held against the digest in its name, in constant memory; an object that cannot be
read is a fault, a remote that cannot be reached is an error.

Example:
    fault = blob_fault(remote, digest, size_bytes, crew=crew)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from vpstore.errors import BadManifest, BlobMissing, DigestMismatch, RemoteFailure
from vpstore.schema.canonical import canonical_bytes
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import Manifest
from vpstore.sharing.crew import Crew
from vpstore.sharing.trust import MAX_ATTESTATION_BYTES, read_attestation
from vpstore.storage.keys import FORMAT as KEY_FORMAT
from vpstore.storage.partial import Digesting
from vpstore.storage.remotes.base import Remote, attestations_prefix, blob_name, key_name

MISSING = "missing"
_MAX_KEY_BYTES = 4096


class ObjectFault(NamedTuple):
    """What is wrong with one object of a remote."""

    name: str
    expected: str
    found: str


def blob_fault(remote: Remote, digest: Digest, size_bytes: int | None, *, crew: Crew) -> str:
    """Read one blob.

    Args:    size_bytes: as a manifest states it; None if none does.
    Returns: what is wrong with it, "" if nothing.
    Raises:  RemoteFailure: the remote cannot be asked at all.
    """
    name = blob_name(digest)
    size = remote.size(name)
    if size is None:
        return MISSING
    crew.expect(size)
    state = Digesting(size)
    try:
        for chunk in crew.watched(remote.chunks(name)):
            state.add(chunk)
            if state.size_bytes > size:
                break
    except BlobMissing:
        return MISSING
    except RemoteFailure as error:
        return f"unreadable: {error.what}" + (f", {error.found}" if error.found else "")
    if state.digest != digest:
        return f"{state.digest}, {size} bytes"
    return "" if size_bytes in (None, size) else f"{size} bytes instead of {size_bytes}"


def key_bytes(key: Digest, artifact: Digest) -> bytes:
    """What a key file says."""
    return canonical_bytes({"format": KEY_FORMAT, "key": key, "artifact": artifact})


def key_fault(remote: Remote, key: Digest, artifact: Digest) -> ObjectFault | None:
    """Hold one key file against its name."""
    name = key_name(key, artifact)
    expected = f"{key} -> {artifact}"
    try:
        data = remote.read(name, limit=_MAX_KEY_BYTES)
    except BlobMissing:
        return ObjectFault(name, expected, MISSING)
    except RemoteFailure as error:
        return ObjectFault(name, expected, f"unreadable: {error.what}")
    return None if data == key_bytes(key, artifact) else ObjectFault(name, expected, "damaged, or another claim")


def claims(remote: Remote, key: Digest) -> Iterator[ObjectFault | Digest]:
    """Every file under one key: the artifact that it names, or what is wrong with it."""
    prefix = f"keys/{key.hex[:2]}/{key.hex}/"
    for name, _ in remote.list(prefix):
        try:
            artifact = Digest.from_hex(name.removeprefix(prefix))
        except BadManifest:
            yield ObjectFault(name, "a key file's name", "a stray object")
            continue
        yield key_fault(remote, key, artifact) or artifact


def attestation_faults(remote: Remote, artifact: Digest) -> Iterator[ObjectFault]:
    """What is wrong with the attestations of one artifact; that there is no sound one is a fault, too."""
    prefix = attestations_prefix(artifact)
    sound = 0
    for name, size in remote.list(prefix):
        try:
            data = remote.read(name, limit=MAX_ATTESTATION_BYTES)
            read_attestation(name.removeprefix(prefix), data, artifact=artifact, where=remote.label)
            sound += 1
        except (BadManifest, DigestMismatch) as error:
            yield ObjectFault(name, error.expected or "a sound attestation", error.found or error.what)
        except (BlobMissing, RemoteFailure) as error:
            yield ObjectFault(name, f"{size} bytes", f"unreadable: {error.what}")
    if not sound:
        yield ObjectFault(prefix, "at least one sound attestation", "none")


def about(remote: Remote, manifest: Manifest) -> list[ObjectFault]:
    """What is wrong with what a remote says about an artifact: its key file, other files of its key, attestations."""
    found = [row for row in claims(remote, manifest.build.key()) if isinstance(row, ObjectFault)]
    own = key_fault(remote, manifest.build.key(), manifest.digest)
    if own is not None and own not in found:
        found.append(own)
    return [*found, *attestation_faults(remote, manifest.digest)]


def names_of_blobs(names: Mapping[str, int]) -> Iterator[tuple[str, Digest | None]]:
    """The blobs that objects' names mean; None for a name that is no blob's."""
    for name in names:
        parts = name.split("/")
        try:
            digest = Digest.from_hex("".join(parts[2:])) if len(parts) == 4 else None
        except BadManifest:
            digest = None
        yield name, digest if digest is not None and blob_name(digest) == name else None
