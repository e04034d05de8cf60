"""verify --remote: read a remote's objects back and list all that is not what it should be.

Place in the path: push -> **verify --remote** -> pull. The manifests are the remote's own; where one of them is damaged
or missing, this store's is used to go on, so that one fault does not hide others.
Invariants: reads only; each blob is read once, in constant memory; faults are complete and sorted.

Example:
    faults = check_remote(work, wanted, remote, everything=False)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from vpstore.errors import BadManifest, BlobMissing, DigestMismatch
from vpstore.schema.digest import Digest
from vpstore.schema.fault import Fault
from vpstore.schema.manifest import Manifest
from vpstore.sharing.crew import DEFAULT_WORKERS, Crew
from vpstore.sharing.inspection import ObjectFault, about, attestation_faults, blob_fault, claims, names_of_blobs
from vpstore.sharing.naming import rightly_named
from vpstore.sharing.plan import Wanted, fetch_manifest, gather
from vpstore.storage.remotes.base import Remote
from vpstore.workspace import Workspace


@dataclass
class _Check:
    """One run."""

    work: Workspace
    remote: Remote
    crew: Crew
    faults: set[Fault] = field(default_factory=set)
    read: set[Digest] = field(default_factory=set)  # blobs that were held against their digest
    _manifests: dict[Digest, Manifest] = field(default_factory=dict)

    def add(self, where: str, *, expected: str, found: str, blob: str = "") -> None:
        """List a fault."""
        self.faults.add(Fault(f"{self.remote.label}: {where}", expected, found, blob))

    def manifest(self, artifact: Digest, label: str) -> Manifest:
        """The remote's manifest, else this store's; the read of gather."""
        if artifact not in self._manifests:
            self.read.add(artifact)
            self._manifests[artifact] = self._fetched(artifact, label)
        return self._manifests[artifact]

    def _fetched(self, artifact: Digest, label: str) -> Manifest:
        try:
            return fetch_manifest(self.remote, artifact, label)
        except (BlobMissing, DigestMismatch, BadManifest) as error:
            found = "missing" if isinstance(error, BlobMissing) else error.found or error.what
            self.add(f"{label}: manifest", expected=artifact, found=found, blob=artifact)
            return self.work.store.manifest(artifact, what=label)


def check_remote(
    work: Workspace,
    wanted: Sequence[Wanted],
    remote: Remote,
    *,
    workers: int = DEFAULT_WORKERS,
    everything: bool = False,
) -> tuple[Fault, ...]:
    """Verify what a remote has of some artifacts and their lineage; with `everything`, also all else that lies there.

    Returns: all faults, sorted; empty if all is well.
    Raises:  RemoteFailure: the remote cannot be reached.
    """
    with Crew(work.narrator, "verify --remote", workers=workers) as crew:
        run = _Check(work, remote, crew)
        names, wrong = rightly_named(wanted, run.manifest)
        for error in wrong:  # missing and damaged ones are listed already
            if isinstance(error, BadManifest) and error.expected:
                run.add(error.where, expected=error.expected, found=error.found)
        lineage = gather(names, run.manifest)
        sizes = lineage.sizes()
        _check_blobs(run, lineage.blobs(), sizes)
        jobs = {
            artifact: crew.start(partial(about, remote, manifest)) for artifact, manifest in lineage.manifests.items()
        }
        for artifact, job in jobs.items():
            _add_all(run, crew.result(job), label=lineage.labels[artifact])
        if everything:
            _check_rest(run, set(lineage.manifests))
    return tuple(sorted(run.faults))


def _check_blobs(run: _Check, blobs: dict[Digest, str], sizes: dict[Digest, int]) -> None:
    jobs = {
        digest: run.crew.start(partial(blob_fault, run.remote, digest, sizes.get(digest), crew=run.crew))
        for digest in blobs
        if digest not in run.read
    }
    for digest, job in jobs.items():
        run.read.add(digest)
        if found := run.crew.result(job):
            run.add(blobs[digest], expected=digest, found=found, blob=digest)


def _add_all(run: _Check, found: list[ObjectFault], *, label: str) -> None:
    for row in found:
        run.add(f"{label}: {row.name}", expected=row.expected, found=row.found)


def _check_rest(run: _Check, known: set[Digest]) -> None:
    """Everything on the remote that no wanted artifact leads to."""
    blobs = dict(run.remote.list("blobs/"))
    found = dict(names_of_blobs(blobs))
    for name, digest in found.items():
        if digest is None:
            run.add(name, expected="a blob's name", found="a stray object")
    _check_blobs(run, {digest: f"blob {digest.short}" for digest in found.values() if digest is not None}, {})
    attested = {name.split("/")[1] for name, _ in run.remote.list("attestations/")}
    for folder in sorted(attested - {artifact.hex for artifact in known}):
        _check_folder(run, "attestations", folder)
    for folder in sorted({name.split("/")[2] for name, _ in run.remote.list("keys/") if name.count("/") == 3}):
        _check_folder(run, "keys", folder)


def _check_folder(run: _Check, kind: str, folder: str) -> None:
    try:
        named = Digest.from_hex(folder)
    except BadManifest:
        run.add(f"{kind}/{folder}", expected="a digest's digits", found="a stray object")
        return
    if kind == "keys":
        rows = [row for row in claims(run.remote, named) if isinstance(row, ObjectFault)]
    else:
        rows = list(attestation_faults(run.remote, named))
    _add_all(run, rows, label="remote")
