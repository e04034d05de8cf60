"""publish: from staged files to an artifact in the store.

Place in the path: tensors -> **publish** -> manifest. Every file becomes a blob, every shard gets a tensor table, the
recipe's files are stored beside them, then manifest, attestation and key, in this order.
Invariants: each blob is durable before anything names it; nothing that leads to the artifact exists before all of it
does; an interruption leaves blobs that nothing names, and a retry reuses them.

Example:
    manifest = publish(work, Publication(ref, record, staged, scratch), facts=stopwatch.facts(root, environment))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import BoundedSemaphore
from typing import Final

from vpstore.errors import BadManifest, RecipeRefused
from vpstore.lineage import tensor_places
from vpstore.runner import Staged, StagedFile
from vpstore.schema.attestation import BuildFacts, Statement
from vpstore.schema.canonical import MAX_BYTES
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import (
    MANIFEST_FILE,
    PROVENANCE_FILE,
    BuildRecord,
    FileRecord,
    IntermediateRecord,
    Manifest,
    RecipeFile,
)
from vpstore.schema.paths import check_distinct, check_path
from vpstore.schema.ref import StageRef
from vpstore.schema.shard_index import is_index
from vpstore.schema.tensor_table import TensorTable
from vpstore.staging import refuse_unfit, remarks
from vpstore.storage import atomic, hashing
from vpstore.storage.tables import read_layout, read_shard
from vpstore.workspace import Workspace

_LARGE: Final = 8 << 20  # from this size on a result is stored by several threads
_WAITING: Final = 2  # how many of them may wait for the disk while every core hashes


@dataclass(frozen=True)
class Publication:
    """What is to be published: the record of the build and its staged result."""

    ref: StageRef
    record: BuildRecord
    staged: Staged
    scratch: Path  # files below it are moved into the store, others are copied
    verbatim: bool = False  # a donor: provenance.json is not added
    recipe: Mapping[RecipeFile, bytes] = field(default_factory=dict)  # what stood in the record's recipe files


def publish(work: Workspace, publication: Publication, *, facts: Callable[[], BuildFacts]) -> Manifest:
    """Put an artifact into the store.

    Args:    facts: called when the bytes are in, so that the attestation says when the build was finished.
    Raises:  RecipeRefused: a staged path is not acceptable, a file is missing, no file or no safetensors shard, or
             shards and index contradict each other; VpstoreError: the disk refuses.
    """
    _check_names(publication)
    places = (work.checkout.root, work.checkout.views, work.store.root)
    for remark in remarks(publication.staged, publication.scratch, places=places):
        work.narrator.warn(f"{publication.ref}: {remark}")
    with atomic.disk_errors(work.store.root, f"publishing {publication.ref}"):
        _store_recipe(work, publication)
        files, intermediates = _store_staged(work, publication)
        if not publication.verbatim:
            files.append(_store_provenance(work, publication.record))
        ref, record = publication.ref, publication.record
        manifest = Manifest(
            ref.object, ref.stage, record, tuple(files), tuple(intermediates), verbatim=publication.verbatim
        )
        _check_shards(work, manifest)
        work.store.announce(manifest)
        work.store.settle()
        work.store.blobs.put_bytes(manifest.encoded)
        work.store.settle()
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
    refuse_unfit(publication.staged, publication.scratch, where=where)


def _store_recipe(work: Workspace, publication: Publication) -> None:
    """Store the closure's files as they were when the key was made; what ran was laid out from these bytes."""
    for row in publication.record.recipe_files:
        if not work.store.blobs.find(row.digest):
            work.store.blobs.put_bytes(publication.recipe[row])


def _store_staged(work: Workspace, publication: Publication) -> tuple[list[FileRecord], list[IntermediateRecord]]:
    """Store every staged file, large results several at a time: one is made durable while others are hashed."""
    staged = [*publication.staged.files, *publication.staged.intermediates]
    total = sum(file.source.stat().st_size for file in staged)
    workers = hashing.cores() if total >= _LARGE else 1
    turns = BoundedSemaphore(workers)
    if len(staged) >= hashing.MANY:  # each waits for the disk, which settles many as fast as one
        workers = max(workers, hashing.WAITERS)
    shown = len(publication.staged.files)
    tasks = [_Task(work, publication, file, turns, total, is_shown=at < shown) for at, file in enumerate(staged)]
    records = []
    for record in hashing.in_threads(_Task.carry_out, tasks, workers=workers if workers == 1 else workers + _WAITING):
        records.append(record)
        work.narrator.progress(f"{publication.ref}: publish", len(records), len(tasks))
    intermediates = [IntermediateRecord(row.path, row.digest, row.size_bytes) for row in records[shown:]]
    return records[:shown], intermediates


@dataclass(frozen=True)
class _Task:
    """One staged file on its way into the store; several may be on it at once."""

    work: Workspace
    publication: Publication
    staged: StagedFile
    turns: BoundedSemaphore  # how many may hash at once
    total_bytes: int  # of all that is published
    is_shown: bool = True  # False: an intermediate, which gets no tensor table

    @property
    def _is_shard(self) -> bool:
        return self.is_shown and self.staged.path.endswith(".safetensors")

    @property
    def _is_ours(self) -> bool:
        """Whether the file may be moved: a scratch file that has no other name."""
        source = self.staged.source
        if source.is_symlink() or not source.is_relative_to(self.publication.scratch):
            return False
        return source.stat().st_nlink == 1

    def carry_out(self) -> FileRecord:
        """Move a scratch file into the store, or copy a file that lies elsewhere or is a link."""
        blobs = self.work.store.blobs
        table: TensorTable | None = None
        if self._is_ours:
            atomic.begin_writing(self.staged.source)  # while it is hashed
            table, digest, size = self._read(self.staged.source)
            blobs.take(self.staged.source, digest)
        else:
            if self._is_shard:
                self._read_layout()  # what is no shard is refused before it is copied
            digest, size = blobs.put_copy(self.staged.source)
            if self._is_shard:
                table, again, _ = self._read(blobs.path(digest))
                if again != digest:
                    blobs.check(digest, what=self._where)  # says what there is to say about a disk that forgets
        listed = None if table is None else blobs.put_bytes(self._encoded(table))
        return FileRecord(self.staged.path, self.staged.media_type, digest, size, listed)

    def _encoded(self, table: TensorTable) -> bytes:
        data = table.encode()
        if len(data) > MAX_BYTES:
            raise RecipeRefused(
                "a shard has more tensors than its table can list",
                where=self._where,
                expected=f"a table of at most {MAX_BYTES} bytes",
                found=f"{len(table.tensors)} tensors, {len(data)} bytes",
                next_step="write the tensors into several shards, or stack them",
            )
        return data

    @property
    def _where(self) -> str:
        return f"{self.publication.ref}, {self.staged.path}"

    def _read(self, path: Path) -> tuple[TensorTable | None, Digest, int]:
        """Digest a file, and the tensors of a shard, in one reading."""
        threads = hashing.threads_for(path.stat().st_size, self.total_bytes, workers=hashing.cores())
        with self.turns, self._refusals():
            if not self._is_shard:
                return (None, *hashing.digest_file(path, threads=threads))
            table, digest = read_shard(path, where=self._where, threads=threads)
            return table, digest, table.size_bytes

    def _read_layout(self) -> None:
        with self._refusals():
            read_layout(self.staged.source, where=self._where)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except BadManifest as error:
            raise RecipeRefused(error.what, where=self._where, expected=error.expected, found=error.found) from error


def _check_shards(work: Workspace, manifest: Manifest) -> None:
    """Let no reader of the checkpoint be left to choose between two shards, or look for one that is not there."""
    if sum(file.tensors is not None for file in manifest.files) < 2 and not any(
        is_index(f.path) for f in manifest.files
    ):
        return
    try:
        places = tensor_places(work.store, manifest)
    except BadManifest as error:
        raise RecipeRefused(error.what, where=error.where, expected=error.expected, found=error.found) from error
    if not places.undecided:
        return
    name, shards = places.undecided[0]
    message = f"{manifest.ref}: several shards hold a tensor {name}, and no index names one: {', '.join(shards[:5])}"
    if manifest.verbatim:  # as somebody else made it, in two precisions for instance
        work.narrator.warn(message)
        return
    raise RecipeRefused(
        "several shards hold one tensor, and no index names one",
        where=f"{manifest.ref}: {name}",
        found=", ".join(shards[:5]),
        next_step="leave all but one out, or write a model.safetensors.index.json that names one",
    )


def _store_provenance(work: Workspace, record: BuildRecord) -> FileRecord:
    data = record.readable()
    return FileRecord(PROVENANCE_FILE, "application/json", work.store.blobs.put_bytes(data), len(data))
