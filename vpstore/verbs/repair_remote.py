"""repair --to-remote: what is damaged or missing on a remote is overwritten from this store.

Place in the path: the other direction of `repair`. Reads back every byte of what a remote has of some artifacts and
their lineage, as `verify --remote` does, and sends what is wrong as `push` does.
Invariants: a blob that is not healthy here never overwrites one there.

Example:
    repaired = repair_remote(work, wanted, remote)
"""

from __future__ import annotations

from collections.abc import Sequence

from vpstore.sharing.crew import DEFAULT_WORKERS, Crew
from vpstore.sharing.inspection import ObjectFault, about
from vpstore.sharing.mending import MISSING, Repaired
from vpstore.sharing.plan import Lineage, Wanted, registered
from vpstore.sharing.report import Report
from vpstore.sharing.sending import send
from vpstore.storage.remotes.base import Remote, blob_name
from vpstore.workspace import Workspace


def repair_remote(
    work: Workspace,
    wanted: Sequence[Wanted],
    remote: Remote,
    *,
    workers: int = DEFAULT_WORKERS,
    is_dry_run: bool = False,
) -> Repaired:
    """Read what a remote has of some artifacts and their lineage, and overwrite what is wrong from this store.

    Returns: what was damaged or missing there; what is not healthy here either is lost, and stays there as it is.
    Raises:  RemoteFailure, Interrupted.
    """
    sent = Report(remote.label, is_dry_run, is_deep=True)
    report = Repaired(str(work.store.root), remote.label, is_dry_run, failures=sent.failures)
    artifacts = [row.artifact for row in wanted]
    with (
        registered(work.store, artifacts, is_dry_run=is_dry_run),
        Crew(work.narrator, "repair", workers=workers) as crew,
    ):
        lineage = send(work, wanted, remote, crew=crew, report=sent)
        _tell_remote(remote, lineage, sent, report)
    return report


def _tell_remote(remote: Remote, lineage: Lineage, sent: Report, report: Repaired) -> None:
    """What was sent in the place of something wrong, and what is still wrong."""
    parts = {blob_name(digest): what for digest, what in lineage.blobs().items()}
    for row in sent.moved:
        found = row.found or MISSING
        where = parts.get(row.name, row.name.partition("/")[0])
        report.add(where, row.name, found=found, action="fetched" if found == MISSING else "replaced")
    mended = [row.name for row in sent.moved]
    for artifact, manifest in lineage.manifests.items():
        for fault in about(remote, manifest):
            # On a dry run the faults that would be mended are still there; a folder's is that of its files.
            if not any(name.startswith(fault.name) for name in mended):
                step = _next_step(fault, str(manifest.ref))
                report.add(lineage.labels[artifact], fault.name, found=fault.found, action="lost", next_step=step)


def _next_step(fault: ObjectFault, ref: str) -> str:
    """What ends a fault of which this store has nothing better."""
    if fault.found in (MISSING, "none"):
        return f"vpstore repair {ref} --from where it is whole, or vpstore build {ref} --force; then this once more"
    return "this store has no healthy one; pull does not believe what is there: remove it from the remote"
