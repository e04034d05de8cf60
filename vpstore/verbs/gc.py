"""gc: delete what nobody needs, and say of everything else why it stays.

Place in the path: after `marking` has found what is needed. Works while nobody changes the store: publishes, cache
hits, locks, views and the registration of pulls wait, or are waited for.
Invariants: nothing that a root leads to is deleted, and nothing younger than the grace period; if damage hides what is
needed, nothing is deleted at all; a leftover that this user cannot remove is named, and stops nothing else; the order
is keys, attestations, manifests (children before parents), other blobs, each durable before the next begins, so that no
name ever leads to missing bytes; a retry after a kill ends in the same state.

Example:
    done = collect(work, Terms(grace_seconds=86400, is_dry_run=True)); done.goes_bytes
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vpstore.collecting.judging import BUSY, SHUT, Collection, Plan, Terms, Verdict, judge, shut_reason
from vpstore.collecting.marking import Marks, Obstacle, mark, shown
from vpstore.errors import BadManifest, UsageError, VpstoreError
from vpstore.holdings import read_holdings
from vpstore.schema.digest import Digest
from vpstore.storage import atomic, leftovers
from vpstore.storage.leftovers import Clock
from vpstore.storage.roots import CheckoutRoot
from vpstore.storage.store import Store
from vpstore.workspace import Workspace


def collect(work: Workspace, terms: Terms, *, forget: Iterable[Path] = ()) -> Collection:
    """Mark and sweep.

    Args:    forget: checkouts that are gone for good; what they had is needed by them no more.
    Raises:  BadManifest: a root file or a manifest that roots lead to is damaged; nothing is deleted.
             UsageError: a checkout to forget is there, or is not known.
    """
    wait = "other processes are at work in this store; waiting for them"
    with (
        atomic.disk_errors(work.store.root, "collecting"),
        work.store.sweeping(waiting=lambda: work.narrator.warn(wait)),
    ):
        records = _to_forget(work, [path.expanduser().absolute() for path in forget])
        clock = Clock(time.time(), terms.grace_seconds)
        current = CheckoutRoot(work.checkout.root, {}, work.identity)
        marks = mark(work.store, clock, current=current, forgotten=records)
        forgotten = tuple(shown(record.checkout) for record in records)
        done = Collection(terms, marks, forgotten, _way_out(work, marks.obstacles))
        if done.is_refused and not terms.is_dry_run:
            raise _refused(marks.obstacles, done.way_out)
        plan = judge(work.store, done, clock)
        if not terms.is_dry_run:
            for record in records:
                work.store.roots.drop(record)
            _refresh(work, marks)
            _Sweep(work.store, plan).carry_out()
    for row in done.verdicts:
        if row.ground == SHUT:
            work.narrator.warn(f"{row.name} stays: {row.why}")
    return done


def _to_forget(work: Workspace, paths: list[Path]) -> list[CheckoutRoot]:
    """The records of checkouts that are not there any more."""
    records = work.store.roots.checkouts()
    forgotten = []
    for path in paths:
        known = [record for record in records if record.checkout == path]
        if not known:
            raise UsageError(
                "no such checkout is registered",
                where=str(path),
                expected="one of " + ", ".join(shown(record.checkout) for record in records),
                next_step="vpstore gc --dry-run lists them",
            )
        found = read_holdings(path)
        if found is not None and (found.artifacts or not found.troubles):  # else nobody can look: the person knows
            known = [record for record in known if record.identity not in ("", found.identity)]
        if not known:
            raise UsageError(
                "a checkout that is there is not forgotten",
                where=str(path),
                next_step="remove its pointers, views and lock entries, or the whole checkout; then it keeps nothing",
            )
        forgotten += known
    return forgotten


def _refused(hidden: list[Obstacle], way_out: str) -> BadManifest:
    return BadManifest(
        "nothing was deleted: damage hides what is needed",
        where=hidden[0].text + (f"; and {len(hidden) - 1} more" if len(hidden) > 1 else ""),
        expected="every pointer can be read, and every manifest that roots lead to",
        next_step=f"{way_out}; --despite-damage takes what is hidden for nothing",
    )


def _way_out(work: Workspace, hidden: list[Obstacle]) -> str:
    """What mends each kind of damage: a manifest comes from elsewhere, a pointer is written anew by a build."""
    steps = dict.fromkeys(_step(work, row) for row in hidden)
    return "; ".join(list(steps)[:3])


def _step(work: Workspace, hidden: Obstacle) -> str:
    if hidden.path is None:
        return "vpstore repair, or build the object again"
    if not hidden.is_pointer:
        return f"put {shown(hidden.path)} right, or `git restore` it"
    ref = next((ref for ref in work.checkout.objects.order if ref.slug == hidden.path.stem), None)
    profile = hidden.path.parts[-3]
    other_profile = "" if profile == work.checkout.profile else f" --profile {profile}"
    elsewhere = "" if hidden.path.is_relative_to(work.checkout.root) else " in the checkout of that pointer"
    return f"vpstore build {ref or 'REF'}{other_profile}{elsewhere}"


def _refresh(work: Workspace, marks: Marks) -> None:
    """Record what each checkout that could be read has now: that is what it keeps if it cannot be read next time."""
    for state in marks.checkouts:
        if state.now is not None:
            work.store.roots.replace(state.record, state.now)


@dataclass(frozen=True)
class _Sweep:
    """One run's deleting."""

    store: Store
    plan: Plan

    def carry_out(self) -> None:
        """Delete what was judged to go; whatever is left after a kill is found again by the next run."""
        # A pull may have made a folder in which its key or attestation is about to appear.
        is_quiet = not self.plan.collection.marks.processes
        _remove_all(self.plan.keys, with_folders=is_quiet)
        _remove_all(self.plan.attestations, with_folders=is_quiet)
        for artifact in self._children_first():
            _remove_all([self.store.blobs.path(artifact)])
        _remove_all(self.plan.blobs)
        if is_quiet:
            self._remove_empty()
        for row, leftover in self.plan.leftovers:
            try:
                with leftovers.unused(self.store, leftover) as is_free:
                    if is_free:
                        atomic.remove_tree(leftover.path)
                    else:  # taken up since it was judged
                        self._stays(row, BUSY, BUSY)
            except PermissionError as error:  # as of a file in a folder that lets only owners remove
                self._stays(row, SHUT, shut_reason(Path(error.filename or leftover.path)))

    def _stays(self, row: Verdict, ground: str, why: str) -> None:
        verdicts = self.plan.collection.verdicts
        verdicts[verdicts.index(row)] = row._replace(goes=False, ground=ground, why=why)

    def _remove_empty(self) -> None:
        """Remove folders of keys and attestations that a killed run left empty."""
        store = self.store
        kept = {artifact.hex for artifact in self.plan.collection.marks.artifacts}
        keys = [folder for fan in atomic.entries(store.keys.root) for folder in atomic.entries(fan)]
        for folder in (*keys, *atomic.entries(store.attestations.root)):
            if folder.is_dir() and folder.name not in kept and not any(folder.iterdir()):
                atomic.remove_tree(folder)

    def _children_first(self) -> list[Digest]:
        """The manifests that go, none before the artifacts that were made from it."""
        parents = {artifact: self._parents(artifact) for artifact in self.plan.manifests}
        order: dict[Digest, None] = {}  # parents first
        for artifact in parents:
            stack = [(artifact, False)]
            while stack:
                here, is_done = stack.pop()
                if here in order:
                    continue
                if is_done:
                    order[here] = None
                else:
                    stack += [(here, True), *((parent, False) for parent in parents[here] if parent in parents)]
        return list(reversed(order))

    def _parents(self, artifact: Digest) -> tuple[Digest, ...]:
        try:
            return tuple(row.artifact for row in self.store.manifest(artifact).build.inputs)
        except (VpstoreError, OSError):  # a damaged one leads nowhere
            return ()


def _remove_all(paths: list[Path], *, with_folders: bool = False) -> None:
    """Remove files, with the folders that they leave empty if asked to, and make that durable."""
    for path in paths:
        atomic.remove(path)
    for folder in sorted({path.parent for path in paths}):
        if with_folders and not any(folder.iterdir()):
            atomic.remove_tree(folder)
            folder = folder.parent
        atomic.fsync_directory(folder)
