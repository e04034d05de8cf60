"""Marking: what of a store is needed, by whom, and what cannot be known.

Place in the path: first half of `gc`; the second deletes. Roots are what checkouts have (pointers, views, lock
entries), what processes at work say they need, and artifacts so young that a root may be on its way; from each root
artifact the whole lineage is kept, with manifests, files, tables, intermediates and recipe files.
Invariants: reads only; called while nobody changes the store; a checkout that cannot be read keeps what it had; if a
needed manifest is damaged or lost, that is said, because what it needs then cannot be known.

Example:
    with store.sweeping(): marks = mark(store, Clock(time.time(), 86400), current=CheckoutRoot(root, {}))
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, NamedTuple

from vpstore.errors import VpstoreError
from vpstore.holdings import Holdings, read_holdings
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import Manifest
from vpstore.storage import atomic
from vpstore.storage.leftovers import Clock
from vpstore.storage.roots import CheckoutRoot
from vpstore.storage.store import Store

State = Literal["read", "in part", "gone", "unreadable", "another", "unregistered"]
YOUNG: Final = "younger than the grace period"


class Root(NamedTuple):
    """One reason to keep an artifact."""

    artifact: Digest
    holder: str  # the checkout, or the process
    name: str  # what the holder calls it: tiny/vpMoE@smoke, view …, lock …

    def __str__(self) -> str:
        return f"{self.name} of {self.holder}" if self.name else self.holder


class Need(NamedTuple):
    """Why one blob stays."""

    what: str  # what the blob is: manifest, model.safetensors, recipe file …
    owner: str  # the artifact it belongs to, object@stage and digits; empty for a blob that a process names
    root: Root  # the first root that leads there

    def __str__(self) -> str:
        return f"{self.what} of {self.owner}: {self.root}" if self.owner else f"{self.what}: {self.root}"


class CheckoutState(NamedTuple):
    """One checkout, as it was found."""

    record: CheckoutRoot
    state: State
    held: int  # how many artifacts it keeps
    detail: str = ""
    now: CheckoutRoot | None = None  # what its record should say; None: leave it

    @property
    def is_there(self) -> bool:
        """Whether this very checkout lies at its path, though perhaps not all of it can be read."""
        return self.state not in ("gone", "another")


class Obstacle(NamedTuple):
    """Damage that hides what is needed."""

    text: str
    path: Path | None = None  # of what cannot be read in a checkout; None: it is a manifest
    is_pointer: bool = False

    def __str__(self) -> str:
        return self.text


@dataclass
class Marks:
    """The result: everything that is not in `blobs` and `artifacts` is needed by nobody."""

    blobs: dict[Digest, Need] = field(default_factory=dict)
    artifacts: dict[Digest, Root] = field(default_factory=dict)  # also ones that are not here
    checkouts: list[CheckoutState] = field(default_factory=list)
    absent: dict[Digest, Root] = field(default_factory=dict)  # named, but never here: nothing to keep
    arriving: dict[Digest, Root] = field(default_factory=dict)  # on its way, needs not known yet
    obstacles: list[Obstacle] = field(default_factory=list)
    processes: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether all that is needed could be known."""
        return not self.obstacles and not self.arriving


def mark(store: Store, clock: Clock, *, current: CheckoutRoot, forgotten: Collection[CheckoutRoot] = ()) -> Marks:
    """Find out what is needed.

    Args:    clock: says which artifacts are young; current: the checkout in which `gc` was called, which counts whether
             or not it is registered; forgotten: records that count no more.
    Raises:  BadManifest: a root file is damaged.
    """
    marks = Marks()
    claimed = frozenset(path.name for path in store.keys.claims())
    walk = _Walk(store, marks, claimed, tuple(atomic.entries(store.blobs.quarantine)))
    for root in _of_processes(store, marks):  # first: what is on its way may be missing, which else means never here
        walk.follow(root, is_arriving=root.artifact not in marks.blobs)
    records = [record for record in store.roots.checkouts() if record not in forgotten]
    for root in _of_checkouts(store, marks, records, current):
        walk.follow(root)
    for root in _of_youth(store, marks, clock):
        walk.follow(root, is_courtesy=True)
    return marks


def _of_checkouts(store: Store, marks: Marks, records: Sequence[CheckoutRoot], current: CheckoutRoot) -> Iterator[Root]:
    here = (current.checkout, current.identity)
    is_registered = any((record.checkout, record.identity) == here for record in records)
    for record in (*records, *(() if is_registered else (current,))):
        found = read_holdings(record.checkout)
        state = _state(record, found, is_registered=record is not current)
        marks.checkouts.append(state)
        artifacts = {} if state.state == "read" else dict(record.artifacts)
        if found is not None:
            artifacts |= found.artifacts
            yield from _by_prefix(store, record, found)
            if state.is_there:
                marks.obstacles += _hidden(record, found)
        for name, artifact in sorted(artifacts.items(), key=_pointers_first):
            yield Root(artifact, shown(record.checkout), name)


def shown(path: Path) -> str:
    """A path for a person or for JSON, also one whose bytes are no text."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def _pointers_first(item: tuple[str, Digest]) -> tuple[int, str]:
    """A pointer is the best of several reasons to show a person, then a lock entry."""
    return (("lock ", "view ").index(item[0][:5]) + 1 if item[0][:5] in ("lock ", "view ") else 0, item[0])


def _state(record: CheckoutRoot, found: Holdings | None, *, is_registered: bool) -> CheckoutState:
    before = len(set(record.artifacts.values()))
    if found is None:
        return CheckoutState(record, "gone", before, "there is no checkout at this path")
    is_known = bool(found.identity) or found.is_whole  # else its identity may be among what cannot be read
    if record.identity and found.identity != record.identity and is_known:
        return CheckoutState(record, "another", before, "another checkout is at this path, or its weights were removed")
    artifacts = found.artifacts if found.is_whole else {**record.artifacts, **found.artifacts}
    held = len(set(artifacts.values()))
    now = CheckoutRoot(record.checkout, artifacts, record.identity) if is_registered else None
    detail = "; ".join(f"{path}: {why}" for path, why in sorted(found.troubles.items()))
    if not found.is_whole:
        return CheckoutState(record, "in part" if found.artifacts else "unreadable", held, detail, now)
    return CheckoutState(record, "read" if is_registered else "unregistered", held, "", now)


def _hidden(record: CheckoutRoot, found: Holdings) -> list[Obstacle]:
    """What a checkout has that cannot be read, and was never recorded either.

    Pointers and views are recorded before they are made; a lock may have come with git.
    """
    is_lock_known = any(name.startswith("lock ") for name in record.artifacts)
    return [
        Obstacle(f"{path}: {why}", Path(path), path in found.pointers)
        for path, why in sorted(found.troubles.items())
        if not record.artifacts or (path == found.lock_path and not is_lock_known)
    ]


def _by_prefix(store: Store, record: CheckoutRoot, found: Holdings) -> Iterator[Root]:
    """Views of which only twelve digits are known keep whatever artifact begins with them."""
    for name, prefix in sorted(found.prefixes.items()):
        for digest in store.blobs.beginning(prefix):
            yield Root(digest, shown(record.checkout), name)


def _of_processes(store: Store, marks: Marks) -> Iterator[Root]:
    """What processes at work name; the blobs of all of them first, as one may name in full what another one wants."""
    found = store.roots.at_work()
    marks.processes = len(found)
    for running in found:
        for blob in sorted(running.blobs):
            marks.blobs.setdefault(blob, Need("needed", "", Root(blob, running.label, "")))
    for running in found:
        for artifact in sorted(running.artifacts):
            yield Root(artifact, running.label, "")


def _of_youth(store: Store, marks: Marks, clock: Clock) -> Iterator[Root]:
    """Artifacts whose manifest, key or attestation is young: whoever made them may not have made the pointer yet."""
    named = {Digest.from_hex(path.name) for path in store.keys.claims()} | set(store.attestations.artifacts())
    young = {Digest.from_hex(path.name) for path in store.keys.claims() if clock.is_young(path)}
    for artifact in sorted(named - marks.artifacts.keys()):
        traces = [store.blobs.path(artifact), *store.attestations.files(artifact)]
        if artifact in young or any(clock.is_young(path) for path in traces):
            yield Root(artifact, YOUNG, "")


@dataclass
class _Walk:
    """From root artifacts down to everything they need."""

    store: Store
    marks: Marks
    claimed: frozenset[str]  # artifacts that keys name, as hex digits
    aside: tuple[Path, ...]  # what lies in quarantine

    def follow(self, root: Root, *, is_arriving: bool = False, is_courtesy: bool = False) -> None:
        """Keep an artifact and its lineage.

        Args:    is_arriving: a process names it; its manifest may come later; is_courtesy: only its age keeps it, so
                 damage in it hides nothing that anybody needs.
        """
        left = [root.artifact]
        while left:
            artifact = left.pop()
            if artifact in self.marks.artifacts:
                continue
            self.marks.artifacts[artifact] = root
            manifest = self._manifest(artifact, root, is_arriving=is_arriving, is_courtesy=is_courtesy)
            owner = f"{manifest.ref if manifest else 'artifact'} {artifact.short}"
            self.marks.blobs.setdefault(artifact, Need("manifest", owner, root))
            if manifest is None:
                continue
            for digest, what in manifest.blobs().items():
                self.marks.blobs.setdefault(digest, Need(what, owner, root))
            left += [row.artifact for row in reversed(manifest.build.inputs)]

    def _manifest(self, artifact: Digest, root: Root, *, is_arriving: bool, is_courtesy: bool) -> Manifest | None:
        try:
            if self.store.blobs.path(artifact).is_file():
                return self.store.manifest(artifact)
            fault = "missing"
        except (VpstoreError, OSError) as error:
            fault = error.what if isinstance(error, VpstoreError) else error.strerror or str(error)
        if is_arriving and fault == "missing":
            self.marks.arriving[artifact] = root
        elif fault == "missing" and not self._was_here(artifact):
            self.marks.absent[artifact] = root
        elif not is_courtesy:
            self.marks.obstacles.append(Obstacle(f"manifest {artifact}, {root}: {fault}"))
        return None

    def _was_here(self, artifact: Digest) -> bool:
        """Whether a missing manifest was lost: an attestation, a key or quarantine knows it."""
        store = self.store
        if any(store.attestations.files(artifact)) or any(path.name.startswith(artifact.hex) for path in self.aside):
            return True
        return artifact.hex in self.claimed
