"""The build cache: has this key already given an artifact that is whole here, under this environment?

Place in the path: between the key and the recipe. A key file is a claim; what it names is believed only when its
manifest has that key, every blob is whole, and an attestation names the same package versions and device kind.
Invariants: of several candidates the lock's comes first, then the pointer's, then the lowest digest; a damaged one
is passed over, never touched.

Example:
    hit = find_build(work, ref, record, environment=runner.environment(prepared))
"""

from __future__ import annotations

from collections.abc import Mapping

from vpstore.errors import VpstoreError
from vpstore.schema.attestation import Statement
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import BuildRecord, Manifest
from vpstore.schema.ref import StageRef
from vpstore.workspace import Workspace


def find_build(
    work: Workspace, ref: StageRef, record: BuildRecord, *, environment: Mapping[str, str]
) -> Manifest | None:
    """The artifact that makes building unnecessary, or None."""
    for artifact in _candidates(work, ref, record.key()):
        manifest = _whole(work, artifact)
        if manifest is None or manifest.ref != ref or manifest.build.key() != record.key():
            continue
        if any(_is_alike(statement, record, environment) for statement in work.store.attestations.of(artifact)):
            return manifest
    return None


def build_statement(work: Workspace, manifest: Manifest) -> Statement | None:
    """The latest attestation of an artifact's own key, or None."""
    own = [s for s in work.store.attestations.of(manifest.digest) if s.key == manifest.build.key()]
    return own[-1] if own else None


def _candidates(work: Workspace, ref: StageRef, key: Digest) -> list[Digest]:
    entry = work.checkout.lock().entry(work.checkout.profile, ref)
    preferred = [entry.artifact] if entry is not None else []
    try:
        pointer = work.checkout.pointers.read(ref)
    except VpstoreError:  # a damaged pointer is about to be rewritten
        pointer = None
    if pointer is not None:
        preferred.append(pointer.artifact)
    claimed = work.store.keys.artifacts(key)
    ranks = {artifact: rank for rank, artifact in reversed(list(enumerate(preferred)))}
    return sorted(claimed, key=lambda artifact: (ranks.get(artifact, len(preferred)), artifact))


def _whole(work: Workspace, artifact: Digest) -> Manifest | None:
    try:
        manifest = work.store.manifest(artifact)
    except VpstoreError:
        return None
    return manifest if all(work.store.blobs.is_whole(digest) for digest in manifest.blobs()) else None


def _is_alike(statement: Statement, record: BuildRecord, environment: Mapping[str, str]) -> bool:
    return statement.key == record.key() and dict(statement.facts.environment) == dict(environment)
