"""lock: accept what is built as what was agreed, or hold the working tree against the agreement.

Place in the path: the registry's agreed half. The only writer of vpstore.lock.
Invariants: an entry is written only for an artifact that is whole here; other profiles' entries stay as they are; the
file is read, changed and replaced by one process at a time.

Example:
    lock_refs(work, [], is_dry_run=False)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from vpstore.errors import NoSuchRef, VpstoreError
from vpstore.holdings import lock_name
from vpstore.preparation import prepare
from vpstore.schema.lockfile import LockEntry, Lockfile
from vpstore.schema.ref import StageRef
from vpstore.storage import atomic
from vpstore.storage.locks import Locks
from vpstore.workspace import Workspace

LOCK: Final = ".agreed"  # in the folder of weights, of all profiles: held by the one who changes vpstore.lock


@dataclass(frozen=True)
class LockChange:
    """One entry before and after."""

    ref: StageRef
    before: LockEntry | None
    after: LockEntry | None

    @property
    def word(self) -> str:
        """What happens to the entry."""
        if self.before == self.after:
            return "kept"
        return "added" if self.before is None else "removed" if self.after is None else "changed"

    def to_json(self) -> dict[str, Any]:
        """The row as `lock --json` prints it."""
        return {
            "object": self.ref.object,
            "stage": self.ref.stage,
            "change": self.word,
            "artifact": self.after.artifact if self.after else None,
            "before": self.before.artifact if self.before else None,
        }


def lock_refs(
    work: Workspace, refs: Sequence[StageRef], *, is_dry_run: bool = False, history: bool = False
) -> tuple[LockChange, ...]:
    """Make the lock say what the pointers say.

    Args:    refs: which; none means every stage that has a pointer, and entries of undeclared stages are removed;
             history: change an entry also where only the history is another, and content and key are the agreed ones.
    Returns: one change a ref, sorted.
    Raises:  NoSuchRef: a named ref has no pointer, or nothing at all is built; BlobMissing, DigestMismatch.
    """
    with work.changing(), _alone(work, is_dry_run=is_dry_run):
        return _lock_refs(work, refs, is_dry_run=is_dry_run, history=history)


@contextmanager
def _alone(work: Workspace, *, is_dry_run: bool) -> Iterator[None]:
    """Be the only one who changes the lock of this checkout: it has all profiles' entries, and is replaced whole."""
    if is_dry_run or not work.checkout.views.exists():  # nothing is built: that is refused, and nothing is made
        yield
        return
    folder = work.checkout.root / work.checkout.config.weights
    waiting = f"another process changes {work.checkout.config.lock}; waiting"
    with (
        work.checkout.opened(folder) as place,
        Locks(place).exclusive(LOCK, waiting=lambda: work.narrator.warn(waiting)),
    ):
        yield


def _lock_refs(work: Workspace, refs: Sequence[StageRef], *, is_dry_run: bool, history: bool) -> tuple[LockChange, ...]:
    lock = work.checkout.lock()
    entries = dict(lock.profiles.get(work.checkout.profile, {}))
    before = dict(entries)
    if not refs:
        declared = set(work.checkout.objects.order)
        entries = {ref: entry for ref, entry in entries.items() if ref in declared}
    built = [ref for ref in (refs or work.checkout.objects.order) if refs or work.checkout.pointers.path(ref).exists()]
    if not built:
        raise NoSuchRef("nothing is built yet", where=f"profile {work.checkout.profile}", next_step="dvc repro")
    for ref in built:  # under `changing`: what is found whole stays until the lock itself keeps it
        found, agreed = _entry(work, ref), before.get(ref)
        if agreed is None or agreed.content is None or history or not agreed.is_kept_by(found):
            entries[ref] = found
    if not is_dry_run:
        _write(work, lock, entries)
    touched = sorted((before.keys() - entries.keys()) | set(built), key=str)
    return tuple(LockChange(ref, before.get(ref), entries.get(ref)) for ref in touched)


def _write(work: Workspace, lock: Lockfile, entries: dict[StageRef, LockEntry]) -> None:
    profile = work.checkout.profile
    with atomic.disk_errors(work.store.root, "registering the lock"):
        work.hold({lock_name(profile, ref): entry.artifact for ref, entry in entries.items()})
    path = work.checkout.lock_path
    with atomic.disk_errors(path, "writing the lock"), work.checkout.opened_file(path) as place:
        if entries != lock.profiles.get(profile, {}):
            atomic.write_if_different(place, lock.with_profile(profile, entries).encode())
        atomic.fsync_directory(place.parent)  # also what a process wrote that died before that


@dataclass(frozen=True)
class LockFault:
    """One stage whose code or params are not the lock's."""

    ref: StageRef
    part: str  # "code", "params" or "entry"
    expected: str
    found: str

    def to_json(self) -> dict[str, str]:
        """The row as `lock --check --json` prints it."""
        return {"ref": str(self.ref), "part": self.part, "expected": self.expected, "found": self.found}


def check_lock(work: Workspace) -> tuple[LockFault, ...]:
    """Hold the working tree's code and params against the lock, without building anything.

    Returns: every stage for which somebody forgot `vpstore lock`, in the order of stages.
    """
    lock = work.checkout.lock()
    profile = work.checkout.profile
    faults = []
    for ref in work.checkout.objects.order:
        entry = lock.entry(profile, ref)
        if entry is None:
            faults.append(LockFault(ref, "entry", "an entry", "none"))
            continue
        record = prepare(work, ref).record(())
        pairs = (("code", entry.code, record.code_digest()), ("params", entry.params, record.params_digest()))
        faults += [LockFault(ref, part, agreed, now) for part, agreed, now in pairs if agreed != now]
    extra = sorted(set(lock.profiles.get(profile, {})) - set(work.checkout.objects.order), key=str)
    return tuple(faults) + tuple(LockFault(ref, "entry", "a declared stage", "none") for ref in extra)


def _entry(work: Workspace, ref: StageRef) -> LockEntry:
    pointer = work.checkout.pointers.read(ref)
    if pointer is None:
        raise NoSuchRef("nothing is built under this name", where=str(ref), next_step=f"vpstore build {ref}")
    manifest = work.store.manifest(pointer.artifact, what=str(ref))
    if manifest.ref != ref:
        raise VpstoreError(
            "a pointer leads to another stage",
            where=str(ref),
            found=str(manifest.ref),
            next_step=f"vpstore build {ref} writes it anew",
        )
    for digest, what in manifest.blobs().items():
        work.store.blobs.ensure(digest, what=f"{ref}, {what}")
    return LockEntry.of(manifest)
