"""The build cache: has this key already given an artifact that is whole here, under this environment?

Place in the path: between the key and the recipe. A key file is a claim; what it names is believed only when its
manifest has that key, every blob is whole, and an attestation names the same package versions and device kind.
Invariants: of several candidates the one with this very history comes first, then the lock's, then the pointer's, then
any other whose differing ancestors are here and attested; a damaged one is passed over, never touched; one that claims
another code or content than it has is refused.

Example:
    hit = find_build(work, ref, record, environment=runner.environment(prepared))  # None: the recipe has to run
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from vpstore.claims import refuse_contradictions
from vpstore.errors import VpstoreError
from vpstore.lineage import walk
from vpstore.schema.attestation import Statement
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import BuildRecord, Manifest
from vpstore.schema.ref import StageRef
from vpstore.workspace import Workspace


def find_build(
    work: Workspace, ref: StageRef, record: BuildRecord, *, environment: Mapping[str, str]
) -> Manifest | None:
    """The artifact that makes building unnecessary, or None."""
    known = {row.digest: row.code for row in record.recipe_files if row.code is not None}
    named = _named(work, ref)
    for manifest in sorted(_candidates(work, ref, record), key=lambda found: _rank(found, record, named)):
        if not all(work.store.blobs.is_whole(digest) for digest in manifest.blobs()):
            continue
        statements = work.store.attestations.of(manifest.digest)
        if not any(_is_alike(statement, record, environment) for statement in statements):
            continue
        if manifest.digest not in named and not _is_attested(work, manifest, record):
            continue
        next_step = f"vpstore build {ref} --force makes another; vpstore audit {ref} lists all that is wrong"
        refuse_contradictions(work.store, manifest, known=known, next_step=next_step)
        return manifest
    return None


def build_statement(work: Workspace, manifest: Manifest) -> Statement | None:
    """The latest attestation of an artifact's own key, or None."""
    own = [s for s in work.store.attestations.of(manifest.digest) if s.key == manifest.build.key()]
    return own[-1] if own else None


def _named(work: Workspace, ref: StageRef) -> list[Digest]:
    """What the lock and the pointer name, in this order."""
    entry = work.checkout.lock().entry(work.checkout.profile, ref)
    named = [entry.artifact] if entry is not None else []
    try:
        pointer = work.checkout.pointers.read(ref)
    except VpstoreError:  # a damaged pointer is about to be rewritten
        pointer = None
    return [*named, *([pointer.artifact] if pointer is not None else [])]


def _candidates(work: Workspace, ref: StageRef, record: BuildRecord) -> list[Manifest]:
    """The artifacts of this key that can be read, in the order of digests."""
    found = []
    for artifact in work.store.keys.artifacts(record.key()):
        with suppress(VpstoreError):
            manifest = work.store.manifest(artifact)
            if manifest.ref == ref and manifest.build.key() == record.key():
                found.append(manifest)
    return found


def _rank(manifest: Manifest, record: BuildRecord, named: Sequence[Digest]) -> tuple[bool, int]:
    is_other = manifest.build.readable() != record.readable()
    return is_other, named.index(manifest.digest) if manifest.digest in named else len(named)


def _is_attested(work: Workspace, manifest: Manifest, record: BuildRecord) -> bool:
    """Whether every ancestor that is not the one of now is here, and somebody who is believed says that it was built.

    A pull brings a statement in only on the word of the lock or of a trusted key: any other was made here.
    """
    now = {row.artifact for row in record.inputs}
    for row in manifest.build.inputs:
        for node in walk(work.store, row.artifact) if row.artifact not in now else ():
            if node.manifest is None or build_statement(work, node.manifest) is None:
                return False
    return True


def _is_alike(statement: Statement, record: BuildRecord, environment: Mapping[str, str]) -> bool:
    return statement.key == record.key() and dict(statement.facts.environment) == dict(environment)
