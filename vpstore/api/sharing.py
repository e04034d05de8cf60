"""push, pull, repair, and what resolve and verify need of them: the functions that move bytes between stores.

Place in the path: composes verbs into what a person calls; the command line is a skin over it. Remotes are opened here.

Example:
    report = vpstore.api.pull("vpDense"); report.moved_bytes
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vpstore.api.targets import targets
from vpstore.errors import NoStore, NoSuchRef, UsageError, VpstoreError
from vpstore.schema.fault import Fault
from vpstore.schema.ref import Ref, parse_ref
from vpstore.sharing.crew import DEFAULT_WORKERS, MAX_WORKERS
from vpstore.sharing.mending import Repaired
from vpstore.sharing.naming import agreed, built_here, here_by_prefix, named, named_all, there_by_prefix
from vpstore.sharing.plan import Wanted
from vpstore.sharing.report import Report
from vpstore.storage.remotes.base import Remote
from vpstore.storage.remotes.directory import DirectoryRemote
from vpstore.storage.store import NAME, Store
from vpstore.verbs.pull import pull as pull_artifacts
from vpstore.verbs.pull import pull_alone
from vpstore.verbs.push import push as push_artifacts
from vpstore.verbs.remote_check import check_remote
from vpstore.verbs.repair import repair_store
from vpstore.verbs.repair_remote import repair_remote
from vpstore.verbs.verify import verifiable
from vpstore.workspace import Workspace

_NAMES: Final = 3  # of a list that is only an example


def push(
    *refs: str,
    work: Workspace | None = None,
    remote: str | None = None,
    jobs: int = DEFAULT_WORKERS,
    is_dry_run: bool = False,
) -> Report:
    """Send artifacts and all that they were built from to a DVC remote; without refs, everything that is built.

    Args:    remote: its name in DVC's configuration; None means the default one; jobs: how many blobs at once.
    Returns: what moved and, among its failures, what is damaged here and stayed.
    Raises:  NoSuchRef: nothing is built; UsageError: no such remote; RemoteFailure.
    """
    work = work or Workspace.find(Path.cwd())
    opened = _open(work, remote, may_be_absent=True)  # before anything is said: without a remote nothing else matters
    failures: list[VpstoreError] = []
    wanted = _built(work, refs, failures)
    report = push_artifacts(work, wanted, opened, workers=_workers(jobs), is_dry_run=is_dry_run)
    sent = {row.artifact for row in report.artifacts if row.is_complete}
    if unlocked := [row.label for row in wanted if row.ref is not None and row.entry is None and row.artifact in sent]:
        work.narrator.warn(_not_locked(unlocked))
    report.failures += failures
    return report


def _not_locked(labels: Sequence[str]) -> str:
    names = ", ".join(labels[:_NAMES]) + (f" and {len(labels) - _NAMES} more" if len(labels) > _NAMES else "")
    return (
        f"{len(labels)} of what is sent is not what vpstore.lock says ({names}), and pull goes by the lock; "
        "`vpstore lock` accepts it"
    )


def pull(
    *refs: str,
    work: Workspace | None = None,
    remote: str | None = None,
    jobs: int = DEFAULT_WORKERS,
    is_dry_run: bool = False,
) -> Report:
    """Fetch artifacts and all that they were built from; without refs, everything that the lock of this profile names.

    Args:    refs: what the lock says of them, else the pointer; `object#prefix` is looked for on the remote.
    Returns: what moved and, among its failures, what could not be had or is not believed.
    Raises:  NoSuchRef: the lock names nothing; UsageError: no such remote; RemoteFailure.
    """
    work = work or Workspace.find(Path.cwd(), create=not is_dry_run)
    opened = _open(work, remote)
    wanted = [] if refs else agreed(work, None)
    for text in refs:
        ref = parse_ref(text)
        wanted += [there_by_prefix(opened, ref)] if ref.prefix is not None else agreed(work, targets(work, [text]))
    return pull_artifacts(work, wanted, opened, workers=_workers(jobs), is_dry_run=is_dry_run)


def repair(
    *refs: str,
    work: Workspace | None = None,
    source: str | Path | None = None,
    to_remote: str | None = None,
    jobs: int = DEFAULT_WORKERS,
    is_dry_run: bool = False,
) -> Repaired:
    """Replace what is damaged or missing of some artifacts; without refs, of every ref of this profile.

    Args:    source: a DVC remote's name, or the folder of another store; None means the default remote, if there is
             one; to_remote: mend this remote from the store instead.
    Raises:  UsageError: both directions at once, no such remote; NoStore: no store in that folder; RemoteFailure.
    """
    work = work or Workspace.find(Path.cwd())
    workers = _workers(jobs)
    failures: list[VpstoreError] = []
    if to_remote is not None:
        if source is not None:
            raise UsageError(
                "repair goes one way at a time",
                expected="a source, or a remote to be mended",
                next_step="leave out one of the two",
            )
        wanted = _built(work, refs, failures)
        opened = _open(work, to_remote, may_be_absent=True)
        repaired = repair_remote(work, wanted, opened, workers=workers, is_dry_run=is_dry_run)
    else:
        wanted = _named(work, refs, failures)
        repaired = repair_store(work, wanted, _source(work, source), workers=workers, is_dry_run=is_dry_run)
    repaired.failures += failures
    return repaired


def verify_remote(
    *refs: str, work: Workspace, remote: str | None = None, everything: bool = False, jobs: int = DEFAULT_WORKERS
) -> tuple[str, tuple[Fault, ...]]:
    """Read back what a remote has of some artifacts and all that they were built from, and list all faults.

    Args:    refs: none means every ref; everything: also what else lies on the remote.
    Returns: which remote that was, and its faults, sorted.
    """
    failures: list[VpstoreError] = []
    wanted, opened = _named(work, refs, failures), _open(work, remote)
    found = list(check_remote(work, wanted, opened, workers=_workers(jobs), everything=everything))
    found += [Fault(row.where, row.expected or "a sound pointer", row.found or row.what) for row in failures]
    return f"the remote {opened.label}", tuple(found)


def fetch(ref: Ref, *, work: Workspace, remote: str | None = None, locked: bool = False) -> Report | None:
    """Fetch what one ref needs itself, without what it was built from.

    Args:    locked: do not fetch what is not the lock's, as `resolve --locked` is going to refuse it.
    Returns: None if all of it is here; the remote is not asked then.
    Raises:  what pull reports as a failure.
    """
    opened = None
    if ref.prefix is None:
        wanted = named(work, work.checkout.objects.find(ref))
    else:
        try:
            wanted = here_by_prefix(work, ref)
        except NoSuchRef:
            opened = _open(work, remote)
            wanted = there_by_prefix(opened, ref)
    if _is_here(work, wanted) or (locked and wanted.entry is None):
        return None
    report = pull_alone(work, wanted, opened or _open(work, remote))
    for text in report.refused:
        work.narrator.warn(text)
    if report.failures:
        raise report.failures[0]
    return report


def _is_here(work: Workspace, wanted: Wanted) -> bool:
    try:
        manifest = work.store.manifest(wanted.artifact)
    except VpstoreError:
        return False
    return all(work.store.blobs.is_whole(digest) for digest in manifest.blobs())


def _built(work: Workspace, refs: Sequence[str], failures: list[VpstoreError]) -> list[Wanted]:
    """What is here under these refs; without refs, under all. `failures` takes what is wrong with single pointers."""
    found = [] if refs else built_here(work, work.checkout.objects.order, failures)
    for text in refs:
        ref, before = parse_ref(text), len(failures)
        is_prefix = ref.prefix is not None
        rows = [here_by_prefix(work, ref)] if is_prefix else built_here(work, targets(work, [text]), failures)
        if not rows and len(failures) == before:
            raise NoSuchRef("nothing is built under this name", where=text, next_step=f"vpstore build {text}")
        found += rows
    if not found:
        _nothing_but(failures)
        raise NoSuchRef("nothing is built yet", where=f"profile {work.checkout.profile}", next_step="dvc repro")
    return found


def _named(work: Workspace, refs: Sequence[str], failures: list[VpstoreError]) -> list[Wanted]:
    """What these refs are, here or not; without refs, all that have a pointer or a lock entry."""
    found = [] if refs else named_all(work, verifiable(work), failures)
    for text in refs:
        ref = parse_ref(text)
        is_prefix = ref.prefix is not None
        found += [here_by_prefix(work, ref)] if is_prefix else named_all(work, targets(work, [text]), failures)
    if not found:
        _nothing_but(failures)
    return found


def _nothing_but(failures: Sequence[VpstoreError]) -> None:
    """Where one pointer is all that there is to go by, what is wrong with it is what is wrong with the command."""
    if failures:
        raise failures[0]


def _open(work: Workspace, name: str | None, *, may_be_absent: bool = False) -> Remote:
    from vpstore.storage.remotes.dvc import open_remote

    return open_remote(work.checkout.root, name, must_exist=not may_be_absent)


def _source(work: Workspace, source: str | Path | None) -> Remote | None:
    if isinstance(source, Path):
        return _other_store(source.expanduser().absolute())
    try:
        return _open(work, source)
    except UsageError as error:
        if source is not None:
            raise
        work.narrator.warn(f"no remote to repair from: {error.what}")
        return None


def _other_store(folder: Path) -> Remote:
    """Another store as a remote: the folder itself, or the store of the checkout in it.

    Raises:  NoStore.
    """
    for root in (folder, folder / NAME):
        if (root / "format").exists():
            return DirectoryRemote(Store.open(root).root, f"the store {root}", folder=".")
    raise NoStore(
        "there is no store here",
        where=str(folder),
        expected=f"a store, or a checkout with {NAME}",
        next_step="name the folder of a store in --from-store, or a DVC remote in --from",
    )


def _workers(jobs: int) -> int:
    if not 1 <= jobs <= MAX_WORKERS:
        expected = f"1 to {MAX_WORKERS}"
        raise UsageError(
            "not a number of jobs", expected=expected, found=str(jobs), next_step=f"jobs={DEFAULT_WORKERS}"
        )
    return jobs
