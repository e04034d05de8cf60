"""repair: damaged and missing objects are had from somewhere else, and the damaged ones kept.

Place in the path: verify -> **repair** -> resolve. The only command that replaces anything; on a remote it is
`repair_remote` that does. What comes is verified before it takes a name; what was here gets a second name in quarantine
first, so that the last copy is never thrown away.
Invariants: stamps are not believed, every blob is read; a missing artifact is fetched only if somebody who is believed
names it, or a manifest that was itself believed and verified names it as a parent; what cannot be had is said, never
passed over; views are left to `resolve`, pointers to `build`.

Example:
    repaired = repair_store(work, wanted, remote)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from vpstore.errors import BadManifest, BlobMissing, BlobUnreadable, DigestMismatch, NotLocked, VpstoreError
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import Manifest
from vpstore.sharing.advice import current_ref, made_again, unread_made_again, unread_name
from vpstore.sharing.crew import DEFAULT_WORKERS, Crew
from vpstore.sharing.mending import MISSING, Repaired
from vpstore.sharing.naming import hold_to_name
from vpstore.sharing.plan import Lineage, Wanted, fetch_manifest, gather, registered
from vpstore.sharing.receiving import receive
from vpstore.sharing.registry import Claims
from vpstore.sharing.trust import Trust
from vpstore.storage import atomic
from vpstore.storage.remotes.base import Remote, blob_name
from vpstore.workspace import Workspace

_NO_COPY = (BlobMissing, DigestMismatch, BadManifest)  # what the source has to say of a blob that it cannot give


@dataclass
class _Repair:
    """One run over this store."""

    work: Workspace
    source: Remote | None
    crew: Crew
    report: Repaired
    faults: dict[Digest, str] = field(default_factory=dict)  # what is wrong with a blob here, "" if nothing
    manifests: dict[Digest, Manifest] = field(default_factory=dict)

    def fault(self, digest: Digest) -> str:
        """Read a blob of the store, whatever the stamps say."""
        if digest not in self.faults:
            self.faults[digest] = _fault(self.work, digest)
        return self.faults[digest]

    def manifest(self, artifact: Digest, label: str) -> Manifest:
        """The manifest here, else the source's; an ancestor's digest in a child is proof enough of its bytes."""
        if artifact not in self.manifests:
            if not self.fault(artifact):
                found = self.work.store.manifest(artifact, what=label)
            elif self.source is None:
                raise BlobMissing("no other copy of a manifest is at hand", where=label, expected=artifact)
            else:
                found = fetch_manifest(self.source, artifact, label)
            self.manifests[artifact] = found
        return self.manifests[artifact]


def repair_store(
    work: Workspace,
    wanted: Sequence[Wanted],
    source: Remote | None,
    *,
    workers: int = DEFAULT_WORKERS,
    is_dry_run: bool = False,
) -> Repaired:
    """Mend what this store has of some artifacts and their ancestors.

    Args:    source: a remote or another store; None: only what follows from what is here is mended.
    Returns: what was damaged or missing, and what was done about each.
    Raises:  RemoteFailure, Interrupted: what was mended by then stays so.
    """
    report = Repaired("" if source is None else source.label, str(work.store.root), is_dry_run)
    artifacts = [row.artifact for row in wanted]
    with (
        registered(work.store, artifacts, is_dry_run=is_dry_run),
        Crew(work.narrator, "repair", workers=workers) as crew,
    ):
        run = _Repair(work, source, crew, report)
        trust = Trust.of(work)
        names = _names(run, wanted, trust)
        lineage = gather(names, run.manifest)
        for artifact, error in lineage.unread.items():
            _lose_manifest(run, artifact, lineage.labels[artifact], error, lineage)
        needed = {*lineage.manifests, *lineage.blobs()}
        with registered(work.store, lineage.manifests, needed, is_dry_run=is_dry_run):
            _mend_blobs(run, lineage)
            for artifact, manifest in lineage.manifests.items():
                if _mend_manifest(run, manifest, label=lineage.labels[artifact]):
                    Claims(work, report, source, trust).mend(manifest)
        if not is_dry_run:
            with atomic.disk_errors(work.store.root, "repairing"):  # also what a repair mended that was killed then
                work.store.blobs.rely_on([*lineage.blobs(), *lineage.manifests])
                work.store.settle()
        work.store.blobs.stamp_written()
    return report


def _fault(work: Workspace, digest: Digest) -> str:
    try:
        work.store.blobs.check(digest)
    except BlobMissing:
        return MISSING
    except BlobUnreadable:  # no copy mends a mode
        raise
    except DigestMismatch as error:
        return error.found
    except OSError as error:
        return f"unreadable: {error.strerror}"
    return ""


def _names(run: _Repair, wanted: Sequence[Wanted], trust: Trust) -> dict[Digest, str]:
    """The artifacts whose manifests are here or can be had; the others are lost, or refused."""
    names: dict[Digest, str] = {}
    for row in wanted:
        try:
            if not (run.work.store.blobs.has(row.artifact) or row.is_exact or _is_vouched(run, row.artifact, trust)):
                raise NotLocked(
                    "a manifest is missing, and nobody who is believed here names it",
                    where=f"{row.label}, {row.artifact}",
                    expected="an entry in vpstore.lock, or an attestation signed with a trusted key",
                    next_step=f"vpstore build {row.label}",
                )
            hold_to_name(row, run.manifest(row.artifact, row.label))
            names.setdefault(row.artifact, row.label)
        except (BadManifest, NotLocked) as error:
            run.report.failures.append(error)
        except (BlobMissing, DigestMismatch) as error:
            _lose_manifest(run, row.artifact, row.label, error)
    return names


def _is_vouched(run: _Repair, artifact: Digest, trust: Trust) -> bool:
    if artifact in trust.locked:
        return True
    return run.source is not None and trust.word(run.source, artifact).is_vouched


def _lose_manifest(
    run: _Repair, artifact: Digest, label: str, error: VpstoreError, lineage: Lineage | None = None
) -> None:
    found = run.fault(artifact)
    where = f"{label}, manifest ({error.what})"
    again = unread_made_again(run.work, artifact)
    if current_ref(run.work, artifact) is None:
        name = unread_name(run.work, artifact, label, () if lineage is None else lineage.manifests.values())
        step = f"vpstore repair {name} --from a remote, or --from-store, that has it; {again}"
    else:
        step = _next_step(run, again)
    run.report.add(where, blob_name(artifact), found=found, action="lost", next_step=step)


def _next_step(run: _Repair, again: str) -> str:
    return again if run.source is not None else f"name another store or remote; else {again}"


def _mend_blobs(run: _Repair, lineage: Lineage) -> None:
    """Read every blob, then fetch those that are damaged or missing."""
    sizes = lineage.sizes()
    reading = {digest: run.crew.start(partial(run.fault, digest)) for digest in lineage.blobs()}
    faulty = {digest: run.crew.result(job) for digest, job in reading.items()}
    coming = {
        digest: run.crew.start(partial(_come, run, digest, sizes.get(digest)))
        for digest, found in faulty.items()
        if found
    }
    for digest in lineage.blobs():
        if digest not in coming:
            continue
        error = run.crew.failure(coming[digest])
        _tell(run, lineage, digest, error)


def _come(run: _Repair, digest: Digest, size_bytes: int | None) -> None:
    name = blob_name(digest)
    if run.source is None:
        raise BlobMissing("no other copy is at hand", where=name, expected=digest)
    if run.report.is_dry_run:
        if run.source.size(name) is None:
            raise BlobMissing("the source has none", where=name, expected=digest)
        return
    run.crew.expect(size_bytes or 0)
    receive(run.work.store, run.source, digest, size_bytes=size_bytes, moved=run.crew.moved)


def _tell(run: _Repair, lineage: Lineage, digest: Digest, error: VpstoreError | None) -> None:
    what, found, name = lineage.blobs()[digest], run.fault(digest), blob_name(digest)
    if error is None:
        run.report.add(what, name, found=found, action="fetched" if found == MISSING else "replaced")
        if not run.report.is_dry_run:
            run.faults[digest] = ""
        return
    if not isinstance(error, _NO_COPY):  # this disk, or the way to the source: whether there is a copy nobody knows
        error.where = f"{what}: {error.where}"
        run.report.failures.append(error)
        return
    where, step = f"{what} ({error.what})", _next_step(run, made_again(run.work, lineage.owner(digest)))
    run.report.add(where, name, found=found, action="lost", next_step=step)


def _mend_manifest(run: _Repair, manifest: Manifest, *, label: str) -> bool:
    """Write a manifest that was damaged, or one that was missing and all of whose blobs are here now.

    Returns: whether it is here, so that something may be said about it.
    """
    found = run.fault(manifest.digest)
    if not found:
        return True
    is_whole = run.report.is_dry_run or not any(run.fault(digest) for digest in manifest.blobs())
    where, name = f"{label}, manifest", blob_name(manifest.digest)
    if found == MISSING and not is_whole:
        run.report.add(where, name, found=found, action="lost", next_step="once its blobs are here, repair again")
        return False
    if not run.report.is_dry_run:
        with atomic.disk_errors(run.work.store.root, f"storing the manifest of {label}"):
            run.work.store.put_manifest(manifest)
    run.report.add(where, name, found=found, action="fetched" if found == MISSING else "replaced")
    return True
