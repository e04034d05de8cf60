"""Sending artifacts and their lineage to a remote, in the order of a publication.

Place in the path: under push, which looks at names and sizes, and `repair --to-remote`, which reads every byte. Blobs
go by many threads; then, artifact by artifact and parents first, what names them: manifest, attestations, key.
Invariants: a remote never names what it lacks, also after a kill; the bytes of a blob are digested while they are sent,
so that a damaged one appears nowhere; an artifact of which something is damaged here is left out with all that was
built from it, and everything else goes.

Example:
    send(work, wanted, remote, workers=8, report=report)
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from vpstore.errors import BadManifest, BlobMissing, DigestMismatch, RemoteFailure, VpstoreError
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import Manifest
from vpstore.sharing.advice import made_again, name_of, unread_made_again, unread_name
from vpstore.sharing.crew import Crew, blob_sizes
from vpstore.sharing.inspection import blob_fault
from vpstore.sharing.naming import rightly_named
from vpstore.sharing.plan import Lineage, Wanted, fetch_manifest, gather, local_reader
from vpstore.sharing.report import Moved, Report, Shared
from vpstore.storage.remotes.base import Remote, attestations_prefix, blob_name, key_name
from vpstore.workspace import Workspace

Names = dict[str, int]  # objects of the remote that are as they should be, with their sizes


@dataclass
class _Sending:
    """One run."""

    work: Workspace
    remote: Remote
    crew: Crew
    report: Report
    lineage: Lineage
    there: dict[Digest, int] = field(default_factory=dict)  # blobs that the remote has, and their sizes
    faults: dict[str, str] = field(default_factory=dict)  # of objects that were read and found wrong
    jobs: dict[Digest, Future[None]] = field(default_factory=dict)
    planned: dict[Digest, int] = field(default_factory=dict)  # blobs that a real run would send
    lacking: dict[Digest, VpstoreError] = field(default_factory=dict)  # blobs that are neither there nor to be had here


def send(work: Workspace, wanted: Sequence[Wanted], remote: Remote, *, crew: Crew, report: Report) -> Lineage:
    """Send what the remote lacks.

    Args:    report: filled; with its `is_dry_run`, nothing is sent; with its `is_deep`, what is there is read, and
             overwritten if it is wrong.
    Returns: the lineage, as far as it could be read here.
    Raises:  RemoteFailure, Interrupted: what moved by then stays.
    """
    run = _Sending(work, remote, crew, report, _lineage(work, wanted, report))
    complete = _elsewhere(run)
    blobs = [*run.lineage.blobs(), *run.lineage.manifests]
    run.there = _read_back(run, blobs) if report.is_deep else blob_sizes(crew, remote, blobs)
    # Asked for before the first blob goes, so that an artifact is finished as soon as its own blobs are there.
    shelves = {
        artifact: crew.start(partial(_shelf, run, manifest)) for artifact, manifest in run.lineage.manifests.items()
    }
    _start_blobs(run)
    for artifact, manifest in run.lineage.manifests.items():
        is_complete = _is_sent(run, manifest) and all(row.artifact in complete for row in manifest.build.inputs)
        there = crew.result(shelves[artifact])
        if is_complete:
            _send_documents(run, manifest, there)
            complete.add(artifact)
        report.artifacts.append(Shared(run.lineage.labels[artifact], artifact, is_complete))
    return run.lineage


def _lineage(work: Workspace, wanted: Sequence[Wanted], report: Report) -> Lineage:
    """All manifests down to the donors; those that cannot be read are failures."""
    read = local_reader(work.store)
    names, failures = rightly_named(wanted, read)
    lineage = gather(names, read)
    report.failures += failures
    report.artifacts += [
        Shared(row.label, row.artifact, is_complete=False) for row in wanted if row.artifact not in names
    ]
    return lineage


def _elsewhere(run: _Sending) -> set[Digest]:
    """The ancestors that are on the remote, though not here, as after `resolve --fetch`; other unread ones fail."""
    there = set()
    told = {row.artifact for row in run.report.artifacts}  # that were asked for themselves
    for artifact, error in run.lineage.unread.items():
        if isinstance(error, BlobMissing):
            with suppress(BlobMissing, DigestMismatch, BadManifest):
                fetch_manifest(run.remote, artifact, run.lineage.labels[artifact])
                there.add(artifact)
        if artifact not in there and artifact not in told:
            run.report.failures.append(error)
    _advise_unread(run)
    return there


def _read_back(run: _Sending, blobs: Sequence[Digest]) -> dict[Digest, int]:
    """The blobs of the remote whose every byte is right; the faults of the others are kept for the report."""
    stated = run.lineage.sizes()
    jobs = {
        digest: run.crew.start(partial(blob_fault, run.remote, digest, stated.get(digest), crew=run.crew))
        for digest in blobs
    }
    whole = {}
    for digest, job in jobs.items():
        if fault := run.crew.result(job):
            run.faults[blob_name(digest)] = fault
        else:
            whole[digest] = stated.get(digest, -1)
    return whole


def _start_blobs(run: _Sending) -> None:
    """Hand every blob that the remote lacks to the crew, in the order in which artifacts can be finished."""
    stated = run.lineage.sizes()
    for digest in run.lineage.blobs():
        path = run.work.store.blobs.path(digest)
        here = path.stat().st_size if path.is_file() else None
        size = stated.get(digest, here)  # None: nobody here knows it, and the remote's word is taken
        if digest in run.there and (run.report.is_deep or size in (None, run.there[digest])):
            run.report.present += 1
        elif here is None:
            run.lacking[digest] = _missing(run, digest)
        elif run.report.is_dry_run:
            run.planned[digest] = here
        else:
            run.crew.expect(here)
            run.jobs[digest] = run.crew.start(partial(_upload, run, digest, path))


def _upload(run: _Sending, digest: Digest, path: Path) -> None:
    run.remote.upload(blob_name(digest), path, digest, moved=run.crew.moved)


def _have_again(name: str, again: str) -> str:
    """What to do about bytes of an artifact that are damaged or missing here."""
    return f"vpstore repair {name} --from REMOTE; if none has it, {again}"


def _advise_unread(run: _Sending) -> None:
    """Say of every manifest that is damaged or missing what to do about it."""
    labels = {row.label: row.artifact for row in run.report.artifacts}
    labels |= {run.lineage.labels[artifact]: artifact for artifact in run.lineage.unread}
    for error in run.report.failures:
        label = max((label for label in labels if error.where.startswith(label)), key=len, default="")
        if label and isinstance(error, (BlobMissing, DigestMismatch)):
            artifact = labels[label]
            name = unread_name(run.work, artifact, label, run.lineage.manifests.values())
            error.advise(_have_again(name, unread_made_again(run.work, artifact)))


def _missing(run: _Sending, digest: Digest) -> BlobMissing:
    return BlobMissing(
        "neither this store nor the remote has a blob",
        where=str(run.work.store.blobs.path(digest)),
        expected=digest,
    )


def _is_sent(run: _Sending, manifest: Manifest) -> bool:
    """Wait for an artifact's blobs; what is wrong with them is reported for each artifact that shares them."""
    failures = []
    for digest, what in manifest.blobs().items():
        if (error := _failure(run, digest)) is not None:
            told = copy(error)
            told.where = f"{manifest.ref}, {what}: {error.where}"
            if isinstance(error, (BlobMissing, DigestMismatch)):
                told.advise(_have_again(name_of(run.work, manifest), made_again(run.work, manifest)))
            failures.append(told)
    run.report.failures += failures
    return not failures


def _failure(run: _Sending, digest: Digest) -> VpstoreError | None:
    """Why a blob is not on the remote; None if it is there, or on a dry run would be."""
    if digest in run.lacking:
        return run.lacking[digest]
    if digest in run.planned:
        _note(run, blob_name(digest), run.planned.pop(digest))
    job = run.jobs.pop(digest, None)
    if job is None:
        return None
    error = run.crew.failure(job)
    if error is None:
        _note(run, blob_name(digest), run.work.store.blobs.path(digest).stat().st_size)
        return None
    run.lacking[digest] = error
    return error


def _note(run: _Sending, name: str, size_bytes: int) -> None:
    run.report.moved.append(Moved(name, size_bytes, run.faults.get(name, "")))


def _shelf(run: _Sending, manifest: Manifest) -> Names:
    """What the remote has of what names an artifact: attestations and key file, by name, with their sizes."""
    key = key_name(manifest.build.key(), manifest.digest)
    size = run.remote.size(key)
    return dict(run.remote.list(attestations_prefix(manifest.digest))) | ({} if size is None else {key: size})


def _send_documents(run: _Sending, manifest: Manifest, there: Names) -> None:
    """Manifest, attestations, key, as far as they are sound here."""
    store, artifact, key = run.work.store, manifest.digest, manifest.build.key()
    if artifact in run.there and (run.report.is_deep or run.there[artifact] == len(manifest.encoded)):
        run.report.present += 1
    else:
        _write(run, blob_name(artifact), manifest.encoded)
    for path in store.attestations.paths(artifact):
        try:
            store.attestations.read(path)
        except VpstoreError as error:  # damaged: not worth sending, and not worth holding the artifact back
            error.next_step = f"vpstore repair {name_of(run.work, manifest)}"
            run.report.failures.append(error)
            continue
        _write_unless_there(run, attestations_prefix(artifact) + path.name, path.read_bytes(), there)
    if artifact in store.keys.artifacts(key):
        data = (store.keys.folder(key) / artifact.hex).read_bytes()
        _write_unless_there(run, key_name(key, artifact), data, there)


def _write_unless_there(run: _Sending, name: str, data: bytes, there: Names) -> None:
    if there.get(name) == len(data) and (not run.report.is_deep or _has(run.remote, name, data)):
        run.report.present += 1
        return
    if name in there:
        run.faults[name] = f"other bytes, {there[name]} of them"
    _write(run, name, data)


def _has(remote: Remote, name: str, data: bytes) -> bool:
    try:
        return remote.read(name, limit=len(data)) == data
    except (BlobMissing, RemoteFailure):
        return False


def _write(run: _Sending, name: str, data: bytes) -> None:
    _note(run, name, len(data))
    if not run.report.is_dry_run:
        run.remote.write(name, data)
