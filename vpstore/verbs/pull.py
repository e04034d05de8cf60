"""pull: what this store lacks of some artifacts and their lineage comes from a remote.

Place in the path: remote -> **pull** -> resolve. The need is read from manifests in memory and registered as a root
before anything is looked for, so that a `gc` at the same time takes nothing away; blobs are verified on their way in;
manifests, attestations and keys follow in the order of a publication, parents before children.
Invariants: an artifact comes in only if somebody is believed who names it: the lock, a trusted key's signature, a
person who typed all its digits, or this store, which has its manifest; claims and attestations only on the word of the
lock or a signature (vpstore.sharing.trust); a damaged blob that is in the way is reported and left to `repair`; what is
whole comes in though an ancestor of it cannot be had, which is said; a pointer is only written where there is none, to
what the lock names, and if the whole lineage is here.

Example:
    report = pull(work, agreed(work, None), remote, workers=8)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import Future
from copy import copy
from dataclasses import dataclass, field
from functools import partial

from vpstore.claims import refuse_contradictions
from vpstore.errors import DigestMismatch, NotLocked, VpstoreError
from vpstore.holdings import lock_name, pointer_name
from vpstore.schema.digest import Digest, apart
from vpstore.schema.lockfile import LockEntry
from vpstore.schema.manifest import Manifest
from vpstore.sharing.crew import DEFAULT_WORKERS, Crew
from vpstore.sharing.naming import rightly_named
from vpstore.sharing.plan import Lineage, RemoteReader, Wanted, gather, registered
from vpstore.sharing.receiving import receive
from vpstore.sharing.report import Moved, Report, Shared
from vpstore.sharing.trust import Trust, Word, missing_files, store_word
from vpstore.storage import atomic
from vpstore.storage.locks import Locks
from vpstore.storage.pointers import LOCK, Pointer
from vpstore.storage.remotes.base import Remote, blob_name
from vpstore.storage.store import Store
from vpstore.workspace import Workspace


@dataclass(frozen=True)
class _Task:
    """What one call was asked for."""

    work: Workspace
    remote: Remote
    wanted: tuple[Wanted, ...]
    has_ancestors: bool
    is_dry_run: bool


@dataclass
class _Pull:
    """One run."""

    task: _Task
    crew: Crew
    report: Report
    lineage: Lineage
    words: dict[Digest, Word]
    jobs: dict[Digest, Future[None]] = field(default_factory=dict)
    lacking: dict[Digest, VpstoreError] = field(default_factory=dict)  # blobs that are not here and did not come

    @property
    def store(self) -> Store:
        return self.task.work.store


def pull(
    work: Workspace,
    wanted: Sequence[Wanted],
    remote: Remote,
    *,
    workers: int = DEFAULT_WORKERS,
    is_dry_run: bool = False,
) -> Report:
    """Fetch artifacts and all that they were built from.

    Returns: what moved; what could not be had or was refused, among its failures.
    Raises:  RemoteFailure, Interrupted: what came by then stays, and is not fetched again.
    """
    return _pull(_Task(work, remote, tuple(wanted), has_ancestors=True, is_dry_run=is_dry_run), workers)


def pull_alone(work: Workspace, wanted: Wanted, remote: Remote) -> Report:
    """Fetch one artifact without what it was built from; no pointer is written."""
    return _pull(_Task(work, remote, (wanted,), has_ancestors=False, is_dry_run=False), DEFAULT_WORKERS)


def _pull(task: _Task, workers: int) -> Report:
    report = Report(task.remote.label, task.is_dry_run)
    with (
        registered(task.work.store, [row.artifact for row in task.wanted], is_dry_run=task.is_dry_run),
        Crew(task.work.narrator, "pull", workers=workers) as crew,
    ):
        run = _begin(task, crew, report)
        needed = {*run.lineage.manifests, *run.lineage.blobs()}
        with registered(run.store, run.lineage.manifests, needed, is_dry_run=task.is_dry_run):
            _start_blobs(run)
            complete = {artifact for artifact, manifest in run.lineage.manifests.items() if _finish(run, manifest)}
            lacks = run.lineage.lacking(complete) if task.has_ancestors else {}
            if not task.is_dry_run:
                run.store.blobs.stamp_written()
                _point(task, complete, {artifact for artifact, above in lacks.items() if not above})
    labels = run.lineage.labels
    told = {row.artifact for row in report.artifacts}
    ordered = [artifact for artifact in (*run.lineage.manifests, *run.lineage.unread) if artifact not in told]
    report.artifacts += [
        Shared(
            labels[artifact], artifact, artifact in complete, lacks.get(artifact, ()) if artifact in complete else ()
        )
        for artifact in ordered
    ]
    return report


def _begin(task: _Task, crew: Crew, report: Report) -> _Pull:
    """Who is believed, and what is needed."""
    work, remote = task.work, task.remote
    trust = Trust.of(work)
    words = _words(crew, trust, remote, [row.artifact for row in task.wanted])
    believed = []
    for row in task.wanted:
        if row.is_exact or words[row.artifact].is_vouched or work.store.blobs.is_whole(row.artifact):
            believed.append(row)
        else:
            report.failures.append(_nobody_vouches(row))
    read = RemoteReader(work.store, remote)
    names, failures = rightly_named(believed, read)
    lineage = gather(names, read, ancestors=task.has_ancestors)
    lineage.labels |= {row.artifact: row.label for row in task.wanted if row.artifact in lineage.unread}
    told = {row.artifact for row in believed}  # what is asked for may be an ancestor of something else that is, too
    unread = [error for artifact, error in lineage.unread.items() if artifact not in told]
    report.failures += [*failures, *unread]
    report.artifacts += [
        Shared(row.label, row.artifact, is_complete=False) for row in task.wanted if row.artifact not in names
    ]
    words |= _words(crew, trust, remote, [artifact for artifact in lineage.manifests if artifact not in words])
    for artifact in lineage.manifests:
        report.refused += words[artifact].refused
    return _Pull(task, crew, report, lineage, words)


def _words(crew: Crew, trust: Trust, remote: Remote, artifacts: Sequence[Digest]) -> dict[Digest, Word]:
    jobs = {artifact: crew.start(partial(trust.word, remote, artifact)) for artifact in artifacts}
    return {artifact: crew.result(job) for artifact, job in jobs.items()}


def _nobody_vouches(row: Wanted) -> NotLocked:
    name = row.ref.object if row.ref is not None else row.object
    return NotLocked(
        "nobody who is believed here names this artifact",
        where=f"{row.label}, {row.artifact}",
        expected="an entry in vpstore.lock, or an attestation signed with a trusted key",
        next_step=f"`vpstore lock` where it was built; or name exactly this one: {name}#{row.artifact.hex}",
    )


def _start_blobs(run: _Pull) -> None:
    """Have every blob fetched that is not here, in the order in which artifacts can be finished."""
    stated = run.lineage.sizes()
    blobs = run.store.blobs
    for artifact in run.lineage.manifests:
        if blobs.has(artifact) and not blobs.is_whole(artifact):
            run.lacking[artifact] = _damaged(artifact, run.lineage.labels[artifact])
    for digest, what in run.lineage.blobs().items():
        if blobs.is_whole(digest):
            run.report.present += 1
        elif blobs.has(digest):
            run.lacking[digest] = _damaged(digest, what)
        elif run.report.is_dry_run:
            run.report.moved.append(Moved(blob_name(digest), stated.get(digest)))
        else:
            run.crew.expect(stated.get(digest, 0))
            come = partial(receive, run.store, run.task.remote, digest, size_bytes=stated.get(digest))
            run.jobs[digest] = run.crew.start(partial(come, moved=run.crew.moved))


def _damaged(digest: Digest, what: str) -> DigestMismatch:
    return DigestMismatch(
        "a blob of this store is damaged; pull replaces nothing",
        expected=digest,
        next_step=f"vpstore repair {what.split(',')[0]} --from REMOTE",
    )


def _finish(run: _Pull, manifest: Manifest) -> bool:
    """Wait for an artifact's blobs, then write what names them.

    Returns: whether all of it is here. Its ancestors may be incomplete: what is damaged of them is reported.
    """
    failures = []
    for digest, what in {**manifest.blobs(), manifest.digest: "manifest"}.items():
        if (error := _failure(run, digest)) is not None:
            told = copy(error)  # each artifact that shares the blob has its own line
            told.where = f"{manifest.ref}, {what}" + (f": {error.where}" if error.where else "")
            failures.append(told)
    store = run.store
    if not failures and not run.report.is_dry_run:
        failures += _untrue(run, manifest)
    run.report.failures += failures
    if failures:
        return False
    word = run.words[manifest.digest]
    if store.blobs.is_whole(manifest.digest):
        run.report.present += 1
    else:
        run.report.moved.append(Moved(blob_name(manifest.digest), len(manifest.encoded)))
    run.report.moved += [Moved(name, len(data)) for name, data in missing_files(store, manifest, word)]
    if not run.report.is_dry_run:
        with atomic.disk_errors(store.root, f"storing {manifest.ref}"):
            store.put_manifest(manifest)
            store_word(store, manifest, word)
    return True


@dataclass(frozen=True)
class _Come:
    """Blobs that are here now, and manifests, which may still be on their way into the store."""

    run: _Pull

    def read(self, digest: Digest) -> bytes:
        return self.run.store.read(digest)

    def manifest(self, artifact: Digest) -> Manifest:
        known = self.run.lineage.manifests.get(artifact)
        return self.run.store.manifest(artifact) if known is None else known


def _untrue(run: _Pull, manifest: Manifest) -> list[VpstoreError]:
    """Why an artifact is refused although all of it came: it claims a code or a content that it does not have."""
    try:
        refuse_contradictions(
            _Come(run), manifest, next_step="tell whoever keeps the remote: it was damaged or forged there"
        )
    except VpstoreError as error:
        return [error]
    return []


def _failure(run: _Pull, digest: Digest) -> VpstoreError | None:
    """Why a blob is not here; None if it is, or after a real run would be."""
    if digest in run.lacking:
        return run.lacking[digest]
    job = run.jobs.pop(digest, None)
    if job is None:
        return None
    error = run.crew.failure(job)
    if error is None:
        run.report.moved.append(Moved(blob_name(digest), run.store.blobs.path(digest).stat().st_size))
    else:
        run.lacking[digest] = error
    return error


def _add_pointer(task: _Task, row: Wanted, entry: LockEntry) -> None:
    work = task.work
    manifest = work.store.manifest(row.artifact)
    pointer = Pointer(manifest.ref, row.artifact, entry.key, manifest.content)
    with work.checkout.opened(work.checkout.views) as place, Locks(place).exclusive(LOCK):
        work.checkout.pointers.add(pointer)


def _point(task: _Task, complete: Collection[Digest], rooted: Collection[Digest]) -> None:
    """Register what this checkout has now, so that `gc` of any other keeps it; write the pointers that are missing.

    A pointer that is there says what was built here, and stays; so does one that cannot be read.

    Args:    rooted: of which every ancestor is here; a pointer to anything else would say that it can be audited here.
    """
    work, profile = task.work, task.work.checkout.profile
    for row in task.wanted:
        if row.ref is None or row.artifact not in complete:
            continue
        try:
            pointer = work.checkout.pointers.read(row.ref)
        except VpstoreError as error:
            work.narrator.warn(f"{row.ref}: {error.what}; left as it is")
            continue
        is_due = pointer is None and row.entry is not None and row.artifact in rooted
        held = {lock_name(profile, row.ref): row.artifact} if row.entry is not None else {}
        held |= {pointer_name(profile, row.ref): row.artifact} if is_due else {}
        with work.changing(), atomic.disk_errors(work.checkout.views, "writing the pointer"):
            work.hold(held)
            if is_due and row.entry is not None:
                _add_pointer(task, row, row.entry)
            elif pointer is not None:
                work.checkout.pointers.settle()
        if pointer is not None and pointer.artifact != row.artifact:
            here, agreed = apart(pointer.artifact, row.artifact)
            work.narrator.warn(
                f"{row.ref}: the pointer here says {here}, the lock {agreed}; "
                "`dvc repro` or `vpstore build` moves it if the working tree is the lock's"
            )
