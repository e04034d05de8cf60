"""Judging: for everything that lies in a store, whether it stays or goes, and why.

Place in the path: between marking and deleting; `gc --dry-run` ends here.
Invariants: what marking found needed stays; what is young stays; if damage or a pull under way hides what is needed,
every blob stays; keys and attestations share the fate of the artifact that they are about; nothing is changed here.

Example:
    plan = judge(store, Collection(terms, marks), clock); plan.collection.goes_bytes
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from vpstore.collecting import marking
from vpstore.collecting.marking import Marks, Need, Root
from vpstore.schema.digest import Digest
from vpstore.storage import leftovers, modes
from vpstore.storage.leftovers import Clock, Leftover
from vpstore.storage.store import Store

Kind = Literal["blob", "key", "attestation", "temporary", "download", "scratch", "process", "quarantine", "stray"]
DAY: Final = 24 * 3600
# Grounds to stay, then grounds to go.
NEEDED: Final = "needed"
YOUNG: Final = "younger than the grace period"
UNKNOWN: Final = "may be needed"
BUSY: Final = "a process is at work on it"
SHUT: Final = "this user cannot remove it"
ASIDE: Final = "kept aside until --quarantine"
FOREIGN: Final = "vpstore made no such file"
UNROOTED: Final = "no root leads to it"
ABANDONED: Final = "left by a process that ended"
REPLACED: Final = "was kept aside"


@dataclass(frozen=True)
class Terms:
    """What the person asked for."""

    grace_seconds: float = DAY
    is_dry_run: bool = False
    despite_damage: bool = False  # take needs that cannot be known for none
    quarantine: bool = False  # delete what is kept aside, too


class Verdict(NamedTuple):
    """Whether one thing stays or goes, and why."""

    kind: Kind
    name: str  # a digest, or a path below the store
    size_bytes: int
    goes: bool
    ground: str  # the kind of reason, for counting: one of the constants above
    why: str  # the reason in full


@dataclass
class Collection:
    """The outcome of one run: what was deleted, or in a dry run would be."""

    terms: Terms
    marks: Marks
    forgotten: tuple[str, ...] = ()  # paths of checkouts
    way_out: str = ""  # what mends the damage for which the run is refused
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def is_refused(self) -> bool:
        """Whether damage hides what is needed, so that nothing may go."""
        return bool(self.marks.obstacles) and not self.terms.despite_damage

    @property
    def goes_bytes(self) -> int:
        """What the run frees, or would."""
        return self.total(goes=True)[1]

    def to_json(self) -> dict[str, Any]:
        """The document as `gc --json` prints it."""
        totals = {}
        for word, goes in (("stays", False), ("goes", True)):
            blobs, everything = self.total(goes=goes, kind="blob"), self.total(goes=goes)
            totals[word] = {"blobs": blobs[0], "blob_bytes": blobs[1], "things": everything[0], "bytes": everything[1]}
        return {
            "dry_run": self.terms.is_dry_run,
            "grace_seconds": self.terms.grace_seconds,
            "ok": not self.is_refused,
            "obstacles": [str(row) for row in self.marks.obstacles],
            "checkouts": [
                {
                    "path": marking.shown(row.record.checkout),
                    "state": row.state,
                    "artifacts": row.held,
                    "detail": row.detail or None,
                }
                for row in self.marks.checkouts
            ],
            "forgotten": list(self.forgotten),
            "processes": self.marks.processes,
            "absent": [{"artifact": digest, "root": str(root)} for digest, root in self.marks.absent.items()],
            "things": [row._asdict() for row in self.verdicts],
            "totals": totals,
        }

    def total(self, *, goes: bool, kind: Kind | None = None) -> tuple[int, int]:
        """How many things stay or go, and their bytes."""
        sizes = [row.size_bytes for row in self.verdicts if row.goes == goes and kind in (None, row.kind)]
        return len(sizes), sum(sizes)


@dataclass
class Plan:
    """What goes, in the order in which it must go, and a verdict for everything."""

    store: Store
    collection: Collection
    clock: Clock
    keys: list[Path] = field(default_factory=list)
    attestations: list[Path] = field(default_factory=list)
    manifests: list[Digest] = field(default_factory=list)  # those that keys or attestations name
    blobs: list[Path] = field(default_factory=list)  # all others
    leftovers: list[tuple[Verdict, Leftover]] = field(default_factory=list)

    def judge_all(self) -> None:
        """A verdict for everything in the store."""
        self._judge_claims("key", self.store.keys.claims(), lambda path: path.name)
        folders = self.store.attestations
        files = (path for artifact in folders.artifacts() for path in folders.files(artifact))
        self._judge_claims("attestation", files, lambda path: path.parent.name)
        named = {path.parent.name for path in self.attestations} | {path.name for path in self.keys}
        for digest in self.store.blobs.all():
            self._judge_blob(digest, is_manifest=digest.hex in named)
        for path in self.store.blobs.strays():
            self._say("stray", path, stays=(FOREIGN, FOREIGN))
        for leftover in leftovers.leftovers(self.store):
            self._judge_leftover(leftover)

    def _judge_claims(self, kind: Kind, paths: Iterable[Path], artifact: Callable[[Path], str]) -> None:
        """Keys and attestations stay or go with the artifact that they are about."""
        for path in paths:
            root = self.collection.marks.artifacts.get(Digest.from_hex(artifact(path)))
            if self._say(kind, path, stays=self._stays(path, root)).goes:
                (self.keys if kind == "key" else self.attestations).append(path)

    def _judge_blob(self, digest: Digest, *, is_manifest: bool) -> None:
        path = self.store.blobs.path(digest)
        row = self._say("blob", path, stays=self._stays(path, self.collection.marks.blobs.get(digest)), name=digest)
        if row.goes and is_manifest:
            self.manifests.append(digest)
        elif row.goes:
            self.blobs.append(path)

    def _stays(self, path: Path, need: Need | Root | None) -> tuple[str, str] | None:
        """The ground and reason on which something stays; None if nothing speaks for it."""
        if need is not None:
            is_courtesy = (need.root if isinstance(need, Need) else need).holder == marking.YOUNG
            return YOUNG if is_courtesy else NEEDED, str(need)
        if self.collection.is_refused:
            return UNKNOWN, f"may be needed: {self.collection.marks.obstacles[0]}"
        if self.collection.marks.arriving:
            artifact, root = next(iter(self.collection.marks.arriving.items()))
            return UNKNOWN, f"may be needed by {artifact.short}, which {root.holder} is bringing"
        return (YOUNG, YOUNG) if self.clock.is_young(path) else None

    def _judge_leftover(self, leftover: Leftover) -> None:
        ground, shut = "", None
        if leftover.kind == "quarantine" and not self.collection.terms.quarantine:
            ground = ASIDE
        elif self.collection.is_refused:
            ground = UNKNOWN
        elif leftover.kind != "process" and self.clock.is_young(leftover.path):
            ground = YOUNG
        elif (shut := leftovers.obstacle(self.store, leftover)) is not None:
            ground = SHUT
        else:
            with leftovers.unused(self.store, leftover) as is_free:
                ground = "" if is_free else BUSY
        going = REPLACED if leftover.kind == "quarantine" else ABANDONED
        stays = (ground, ground if shut is None else shut_reason(shut)) if ground else None
        row = self._say(leftover.kind, leftover.path, stays=stays, going=going)
        if row.goes:
            self.leftovers.append((row, leftover))

    def _say(
        self, kind: Kind, path: Path, *, stays: tuple[str, str] | None, name: str = "", going: str = UNROOTED
    ) -> Verdict:
        ground, why = stays or (going, going)
        name = name or path.relative_to(self.store.root).as_posix()
        row = Verdict(kind, name, leftovers.size(path), stays is None, ground, why)
        self.collection.verdicts.append(row)
        return row


def shut_reason(place: Path) -> str:
    """Why this user cannot remove something, and who can.

    Args:    place: the file or folder that the kernel refuses.
    """
    owner = modes.whose(place)
    return f"{SHUT}, but its owner's gc does: {place}" + (f": {owner}" if owner else "")


def judge(store: Store, collection: Collection, clock: Clock) -> Plan:
    """Judge everything.

    Args:    collection: with the marks; the verdicts are put into it.
    """
    plan = Plan(store, collection, clock)
    plan.judge_all()
    return plan
