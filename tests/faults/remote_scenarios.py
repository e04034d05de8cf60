"""push, pull, repair and gc on the faulty disk, and what is asked of a remote afterwards.

The threads that move bytes are made to work one after another, so that the n-th call is the same in every run.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import vpstore.sharing.crew as crew
from vpstore.errors import VpstoreError
from vpstore.schema.digest import Digest
from vpstore.sharing.naming import agreed, built_here, named
from vpstore.sharing.report import Report
from vpstore.storage.remotes.directory import DirectoryRemote
from vpstore.verbs.pull import pull
from vpstore.verbs.push import push
from vpstore.verbs.remote_check import check_remote
from vpstore.verbs.repair import repair_store
from vpstore.workspace import Workspace

Acknowledge = Callable[[str, str], None]
REMOTE = Path("remote")


class Serial:
    """An executor that does what it is given at once."""

    def __init__(self, **settings: Any) -> None:
        pass

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        job: Future[Any] = Future()
        try:
            job.set_result(function(*arguments))
        except BaseException as error:
            job.set_exception(error)
        return job

    def shutdown(self, **settings: Any) -> None:
        pass


def remote() -> DirectoryRemote:
    crew.ThreadPoolExecutor = Serial
    return DirectoryRemote(REMOTE.absolute(), "shelf")


def push_all(acknowledge: Acknowledge) -> None:
    """Everything that is built goes to an empty remote."""
    work = Workspace.find(Path.cwd())
    shelf = remote()
    _mind(push(work, built_here(work, work.checkout.objects.order), shelf, workers=1))
    acknowledge("remote", "all")


def pull_all(acknowledge: Acknowledge) -> None:
    """Everything that the lock names comes to a fresh clone."""
    work = Workspace.find(Path.cwd(), create=True)
    shelf = remote()
    wanted = agreed(work, None)
    _mind(pull(work, wanted, shelf, workers=1))
    for row in wanted:
        acknowledge(str(row.ref), row.artifact)


def repair_all(acknowledge: Acknowledge) -> None:
    """Damaged and missing blobs are replaced from the remote."""
    work = Workspace.find(Path.cwd())
    shelf = remote()
    wanted = [named(work, ref) for ref in work.checkout.objects.order]
    repaired = repair_store(work, wanted, shelf, workers=1)
    lost = [row for row in repaired.rows if row.action == "lost"]
    if lost:
        raise VpstoreError("not all could be repaired", where=str(lost[0].where), next_step=lost[0].next_step)
    if repaired.failures:
        raise repaired.failures[0]
    for row in wanted:
        acknowledge(str(row.ref), row.artifact)


def collect(acknowledge: Acknowledge) -> None:
    """What no pointer and no view leads to goes."""
    from vpstore.api.keeping import Terms, gc

    gc(Terms(grace_seconds=0), work=Workspace.find(Path.cwd()))
    acknowledge("gc", "all")


def _mind(report: Report) -> None:
    if report.failures:
        raise report.failures[0]


def faults_of_remote(*, is_complete: bool) -> list[str]:
    """What is wrong on the remote: a name whose bytes are others, or one that leads to what is not there.

    Args:    is_complete: everything that is built must be there.
    """
    folder = REMOTE / "vpstore"
    if not folder.is_dir():
        return ["nothing is there"] if is_complete else []
    found = []
    blobs = {path.parent.name + path.name: path for path in (folder / "blobs" / "blake3").glob("??/*")}
    for digits, path in blobs.items():
        if len(digits) != 64 or Digest.of(path.read_bytes()).hex != digits:
            found.append(f"wrong bytes under {path}")
    work = Workspace.find(Path.cwd())
    for key in (folder / "keys").glob("??/*/*"):
        needed = [key.name]
        with suppress(VpstoreError):
            needed += [digest.hex for digest in work.store.manifest(Digest.from_hex(key.name)).blobs()]
        found += [f"{key} leads to what is not there: {digits}" for digits in needed if digits not in blobs]
    if is_complete:
        wanted = [named(work, ref) for ref in work.checkout.objects.order]
        found += [f"{fault.where}: {fault.found}" for fault in check_remote(work, wanted, remote(), workers=1)]
    return found
