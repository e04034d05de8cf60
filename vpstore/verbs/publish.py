"""publish: from staged files to an artifact in the store.

Place in the path: tensors -> **publish** -> manifest. Every file becomes a blob, every shard gets a tensor table, the
recipe's files are stored beside them, then manifest, attestation and key, in this order.
Invariants: each blob is durable before anything names it; nothing that leads to the artifact exists before all of it
does; an interruption leaves blobs that nothing names, and a retry reuses them.

Example:
    manifest = publish(work, Publication(ref, record, staged, scratch), facts=stopwatch.facts(root, environment))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vpstore.errors import BadManifest, RecipeRefused
from vpstore.runner import Staged, StagedFile
from vpstore.schema.attestation import BuildFacts, Statement
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import (
    MANIFEST_FILE,
    PROVENANCE_FILE,
    BuildRecord,
    FileRecord,
    IntermediateRecord,
    Manifest,
)
from vpstore.schema.paths import check_distinct, check_path
from vpstore.schema.ref import StageRef
from vpstore.storage import atomic
from vpstore.storage.tables import read_table
from vpstore.workspace import Workspace


@dataclass(frozen=True)
class Publication:
    """What is to be published: the record of the build and its staged result."""

    ref: StageRef
    record: BuildRecord
    staged: Staged
    scratch: Path  # files below it are moved into the store, others are copied
    verbatim: bool = False  # a donor: provenance.json is not added


def publish(work: Workspace, publication: Publication, *, facts: Callable[[], BuildFacts]) -> Manifest:
    """Put an artifact into the store.

    Args:    facts: called when the bytes are in, so that the attestation says when the build was finished.
    Raises:  RecipeRefused: a staged path is not acceptable, a file is missing or is no safetensors shard, or a recipe
             file changed while the recipe ran; VpstoreError: the disk refuses.
    """
    _check_names(publication)
    with atomic.disk_errors(work.store.root, f"publishing {publication.ref}"):
        _store_recipe(work, publication)
        files = [_store_file(work, publication, staged) for staged in publication.staged.files]
        if not publication.verbatim:
            files.append(_store_provenance(work, publication.record))
        intermediates = []
        for staged in publication.staged.intermediates:
            digest, size = _store_bytes(work, publication, staged)
            intermediates.append(IntermediateRecord(staged.path, digest, size))
        manifest = Manifest(
            publication.ref.object, publication.ref.stage, publication.record, tuple(files), tuple(intermediates)
        )
        work.store.blobs.put_bytes(manifest.encoded)
        attest(work, manifest, facts=facts())
        work.store.keys.add(publication.record.key(), manifest.digest)
        work.store.blobs.stamp_written()
    return manifest


def attest(work: Workspace, manifest: Manifest, *, facts: BuildFacts) -> None:
    """Record that a build gave this artifact; an artifact may have many attestations."""
    work.store.attestations.add(Statement.of(manifest, facts))


def _check_names(publication: Publication) -> None:
    where = str(publication.ref)
    reserved = [MANIFEST_FILE] if publication.verbatim else [MANIFEST_FILE, PROVENANCE_FILE]
    try:
        paths = [check_path(staged.path, where=where) for staged in publication.staged.files]
        check_distinct([*reserved, *paths], where=where)
        check_distinct([check_path(s.path, where=where) for s in publication.staged.intermediates], where=where)
    except BadManifest as error:
        raise RecipeRefused(error.what, where=where, expected=error.expected, found=error.found) from error
    for staged in (*publication.staged.files, *publication.staged.intermediates):
        if not staged.source.is_file():
            raise RecipeRefused("a staged file is missing", where=f"{where}, {staged.path}", found=str(staged.source))


def _store_recipe(work: Workspace, publication: Publication) -> None:
    """Store the closure's files; they must still be what the key says."""
    for row in publication.record.recipe_files:
        if work.store.blobs.is_whole(row.digest):
            unchanged = atomic.digest_file(work.checkout.root / row.path)[0] == row.digest
        else:
            unchanged = work.store.blobs.put_copy(work.checkout.root / row.path)[0] == row.digest
        if not unchanged:
            raise RecipeRefused(
                "a recipe file changed while the recipe ran",
                where=f"{publication.ref}, {row.path}",
                expected=row.digest,
                next_step="put it back to publish what was computed, or run again to build with the new file",
            )


def _store_file(work: Workspace, publication: Publication, staged: StagedFile) -> FileRecord:
    table: Digest | None = None
    if staged.path.endswith(".safetensors"):
        where = f"{publication.ref}, {staged.path}"
        try:
            table = work.store.blobs.put_bytes(read_table(staged.source, where=where).encode())
        except BadManifest as error:
            raise RecipeRefused(error.what, where=where, expected=error.expected, found=error.found) from error
    digest, size = _store_bytes(work, publication, staged)
    return FileRecord(staged.path, staged.media_type, digest, size, table)


def _store_bytes(work: Workspace, publication: Publication, staged: StagedFile) -> tuple[Digest, int]:
    """Move a scratch file into the store, or copy a file that lies elsewhere or is a link."""
    is_ours = staged.source.is_relative_to(publication.scratch) and not staged.source.is_symlink()
    if not is_ours or staged.source.stat().st_nlink > 1:
        return work.store.blobs.put_copy(staged.source)
    digest, size = atomic.digest_file(staged.source)
    work.store.blobs.take(staged.source, digest)
    return digest, size


def _store_provenance(work: Workspace, record: BuildRecord) -> FileRecord:
    data = record.readable()
    return FileRecord(PROVENANCE_FILE, "application/json", work.store.blobs.put_bytes(data), len(data))
