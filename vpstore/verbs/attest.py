"""attest: sign what is known of an artifact's build, and its files, with a key.

Place in the path: after publish, by a person. The build statement goes into the store as a DSSE envelope, beside the
bare ones; the Model Signing bundle goes to a file of the person's choice, for whoever gets the directory.
Invariants: nothing is signed that contradicts the manifest; a bundle names the SHA-256 of bytes that were found to be
the manifest's by the same reading; nothing is written before everything is signed.

Example:
    envelope = sign_build(work, manifest, key); store_envelope(work, manifest, envelope)
    write_bundle(work, sign_files(work, manifest, key, view=view), file)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from vpstore.errors import BadManifest, UsageError
from vpstore.schema.attestation import BuildFacts, Statement
from vpstore.schema.canonical import parse_strict
from vpstore.schema.dsse import Envelope
from vpstore.schema.manifest import MANIFEST_FILE, Manifest
from vpstore.schema.model_signing import bundle, is_bundle, lineage_block, signing_statement
from vpstore.signatures import SigningKey
from vpstore.storage import atomic
from vpstore.storage.sha256 import sha256_of
from vpstore.workspace import Workspace

# What is said of a build of which only the result is known. The moment is no moment of any build.
_UNKNOWN_MOMENT = "1970-01-01T00:00:00Z"
_UNKNOWN = BuildFacts(_UNKNOWN_MOMENT, _UNKNOWN_MOMENT, 0, 0.0, {}, {"commit": None, "dirty": None}, {})


def sign_build(work: Workspace, manifest: Manifest, key: SigningKey) -> Envelope:
    """The artifact's latest build statement, signed; one that says only what the manifest says if there is none."""
    statement = next(_own_statements(work, manifest), None)
    if statement is None:
        work.narrator.warn(
            f"{manifest.ref}: no sound build statement is here; signing one that knows neither time nor environment"
        )
        statement = Statement.of(manifest, _UNKNOWN)
    return key.seal(statement.encode())


def store_envelope(work: Workspace, manifest: Manifest, envelope: Envelope) -> Path:
    """Put an envelope beside the artifact's other attestations; the same one again changes nothing."""
    with atomic.disk_errors(work.store.root, "storing a signed attestation"), work.store.changing():
        return work.store.attestations.add_envelope(manifest.digest, envelope)


def sign_files(work: Workspace, manifest: Manifest, key: SigningKey, *, view: Path) -> bytes:
    """The Model Signing bundle of the directory that shows an artifact.

    Raises:  UsageError: a key that the stock verifier does not know; BlobMissing, DigestMismatch: a file is damaged.
    """
    refuse_for_bundle(key)
    files = {MANIFEST_FILE: manifest.digest, **{row.path: row.digest for row in manifest.files}}
    with atomic.disk_errors(work.store.root, "reading an artifact"):
        sha256 = sha256_of(
            work.store.blobs,
            {digest: f"{manifest.ref}, {path}" for path, digest in files.items()},
            told=lambda done, total: work.narrator.progress("sign", done, total),
        )
    payload = signing_statement(
        view.name,
        {path: sha256[digest] for path, digest in files.items()},
        is_linked=any((view / path).is_symlink() for path in files),
        lineage=lineage_block(manifest),
    )
    return bundle(key.seal(payload))


def refuse_for_bundle(key: SigningKey) -> None:
    """Hold a key against what Model Signing can verify.

    Raises:  UsageError: not ECDSA.
    """
    if not key.is_ecdsa:
        raise UsageError(
            "a Model Signing bundle needs an ECDSA key",
            expected="ECDSA on P-256, P-384 or P-521: `model_signing verify key` knows no other",
            found=key.algorithm,
            next_step="sign without -o, or use another key for the bundle",
        )


def refuse_place(work: Workspace, file: Path, *, key: Path) -> None:
    """Hold the place of a bundle against what it would spoil.

    Raises:  UsageError: in the store or in a view, where it would be a foreign file; the key itself; something that is
             no bundle; no such folder.
    """
    real = Path(os.path.realpath(file))
    views = Path(os.path.realpath(work.checkout.views))
    fault = ""
    if real.is_relative_to(os.path.realpath(work.store.root)):
        fault = "outside the store"
    elif real.is_relative_to(views) and real.parent != views:
        fault = "outside the views: a signed directory must not change"
    elif real == Path(os.path.realpath(key)):
        fault = "another file than the key"
    elif not real.parent.is_dir():
        fault = "a file in a folder that is there"
    elif real.exists() and not _is_bundle(real):
        fault = "a new file, or an older bundle to replace"
    if fault:
        raise UsageError(
            "a bundle cannot be written there", where=str(file), expected=fault, next_step="-o FILE elsewhere"
        )


def write_bundle(file: Path, data: bytes) -> None:
    """Write the bundle, whole or not at all; an older one is replaced."""
    with atomic.disk_errors(file, "writing a bundle"):
        atomic.write_if_different(Path(os.path.realpath(file)), data)


def _own_statements(work: Workspace, manifest: Manifest) -> Iterator[Statement]:
    """The statements that say of this artifact what its manifest says, the latest first."""
    for statement in reversed(work.store.attestations.of(manifest.digest)):
        if Statement.of(manifest, statement.facts).document == statement.document:
            yield statement


def _is_bundle(file: Path) -> bool:
    try:
        return file.is_file() and is_bundle(parse_strict(file.read_bytes(), where=str(file)))
    except BadManifest:
        return False
