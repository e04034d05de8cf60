"""push: what a remote lacks of some artifacts and their lineage goes there.

Place in the path: publish -> **push** -> remote. The order is that of a publication: an artifact's blobs, its manifest,
its attestations, its key; parents before children; so a remote never names what it lacks, also after a kill.
Invariants: only what is missing moves, or has another size there; what is damaged here appears nowhere.

Example:
    report = push(work, built_here(work, stages), remote, workers=8)
"""

from __future__ import annotations

from collections.abc import Sequence

from vpstore.sharing.crew import DEFAULT_WORKERS, Crew
from vpstore.sharing.plan import Wanted, registered
from vpstore.sharing.report import Report
from vpstore.sharing.sending import send
from vpstore.storage.remotes.base import Remote
from vpstore.workspace import Workspace


def push(
    work: Workspace,
    wanted: Sequence[Wanted],
    remote: Remote,
    *,
    workers: int = DEFAULT_WORKERS,
    is_dry_run: bool = False,
) -> Report:
    """Send artifacts and their lineage.

    Returns: what moved; damaged and missing blobs, by artifact, among its failures.
    Raises:  RemoteFailure, Interrupted: what moved by then stays, and is not moved again.
    """
    report = Report(remote.label, is_dry_run)
    artifacts = [row.artifact for row in wanted]
    with (
        registered(work.store, artifacts, is_dry_run=is_dry_run),
        Crew(work.narrator, "push", workers=workers) as crew,
    ):
        send(work, wanted, remote, crew=crew, report=report)
    return report
