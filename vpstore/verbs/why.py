"""why: what makes two artifacts different, back to where it began.

Place in the path: a reading verb over two lineages, or over one and the lock. Compares what went into each build; where
parents differ it goes on with them, as long as they are of one object and stage, and ends at the root causes.
Invariants: every pair of artifacts is compared once; a pair that differs only through its parents is no root cause.

Example:
    found = why(work, walk(store, before), walk(store, after)); found.roots
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vpstore.errors import VpstoreError
from vpstore.evidence.registry import Agreement, agreement
from vpstore.lineage import Lineage, Node, tensor_rows
from vpstore.schema.attestation import Statement
from vpstore.schema.digest import Digest
from vpstore.schema.lockfile import LockEntry, Profile
from vpstore.schema.manifest import BuildRecord, Manifest
from vpstore.schema.typed import is_other
from vpstore.workspace import Workspace


@dataclass(frozen=True)
class Reason:
    """One thing that went into both builds and was not the same."""

    kind: str  # of the build record: "object", "recipe", "param", "source", "variable", "input" or a pin's role;
    # of equal keys: "bytes", "environment", "builder" or "git"; "unknown" where something is not here
    name: str
    before: Any  # JSON
    after: Any
    absent: Literal["", "before", "after"] = ""  # on which side there is no such thing at all

    def to_json(self) -> dict[str, Any]:
        """The reason as `why --json` prints it; a side without such a thing is not in it."""
        sides = {side: getattr(self, side) for side in ("before", "after") if side != self.absent}
        return {"kind": self.kind, "name": self.name, **sides}


@dataclass(frozen=True)
class Step:
    """Two artifacts of one role, compared."""

    roles: tuple[str, ...]  # from the two that were asked about to these
    before: Node
    after: Node
    reasons: tuple[Reason, ...]
    is_root: bool  # something other than a parent differs, or nothing further is known
    tensors: tuple[str, ...] | None = None  # names that differ; None: not known, as something is not here
    files: tuple[str, ...] | None = None  # paths that differ; None: a manifest is not here

    def to_json(self) -> dict[str, Any]:
        """The step as `why --json` prints it."""
        return {
            "roles": list(self.roles),
            "before": {"name": self.before.name, "artifact": self.before.artifact},
            "after": {"name": self.after.name, "artifact": self.after.artifact},
            "root": self.is_root,
            "reasons": [reason.to_json() for reason in self.reasons],
            "tensors": None if self.tensors is None else list(self.tensors),
            "files": None if self.files is None else list(self.files),
        }


@dataclass(frozen=True)
class Explanation:
    """What makes two artifacts different."""

    steps: tuple[Step, ...]  # the two that were asked about first; none if they are one
    relation: str = ""  # how one comes from the other, in words

    def to_json(self, diffs: Mapping[tuple[str, ...], list[str]] | None = None) -> dict[str, Any]:
        """The document as `why --json` prints it.

        Args:    diffs: lines of how the recipe files differ, by a step's roles.
        """
        steps = [{**step.to_json(), "diff": (diffs or {}).get(step.roles, [])} for step in self.steps]
        return {"same": not self.steps, "relation": self.relation or None, "steps": steps}

    @property
    def roots(self) -> tuple[Step, ...]:
        """Where the difference begins."""
        return tuple(step for step in self.steps if step.is_root)


def why(work: Workspace, before: Lineage, after: Lineage) -> Explanation:
    """Compare two artifacts and, where their parents differ, those."""
    steps: list[Step] = []
    seen: set[tuple[Digest, Digest]] = set()
    waiting: list[tuple[tuple[str, ...], Digest, Digest]] = [((), before.top, after.top)]
    while waiting:
        roles, left, right = waiting.pop(0)
        if left == right or (left, right) in seen:
            continue
        seen.add((left, right))
        step, below = _compare(work, roles, before.nodes[left], after.nodes[right])
        steps.append(step)
        waiting.extend(below)
    return Explanation(tuple(steps), _relation(before, after))


def _relation(before: Lineage, after: Lineage) -> str:
    for one, other in ((before, after), (after, before)):
        if one.top != other.top and one.top in other.nodes:
            return f"{one.nodes[one.top].name} is an ancestor of {other.nodes[other.top].name}"
    return ""


def _compare(
    work: Workspace, roles: tuple[str, ...], left: Node, right: Node
) -> tuple[Step, list[tuple[tuple[str, ...], Digest, Digest]]]:
    """One pair, and the pairs of parents to go on with."""
    if left.manifest is None or right.manifest is None:
        reason = Reason("unknown", "manifest", left.reason or "present", right.reason or "present")
        return Step(roles, left, right, (reason,), is_root=True), []
    reasons = list(_reasons(left.manifest, right.manifest))
    if left.manifest.build.key() == right.manifest.build.key():
        reasons.extend(_environments(work, left.manifest, right.manifest))
    below = list(_parents(left.manifest, right.manifest))
    is_root = any(reason.kind != "input" for reason in reasons) or not below
    tensors = _differing_tensors(work, left.manifest, right.manifest)
    files = _differing_files(left.manifest, right.manifest)
    return Step(roles, left, right, tuple(reasons), is_root, tensors, files), [
        ((*roles, role), before, after) for role, before, after in below
    ]


def _reasons(left: Manifest, right: Manifest) -> Iterator[Reason]:
    before, after = left.build, right.build
    if left.ref != right.ref:
        yield Reason("object", "object@stage", str(left.ref), str(right.ref))
    if before.entry != after.entry:
        yield Reason("recipe", "entry", before.entry, after.entry)
    yield from _pairs("recipe", _recipe_files(before), _recipe_files(after))
    yield from _pairs("param", dict(flattened(before.params)), dict(flattened(after.params)))
    yield from _pairs("source", _sources(before), _sources(after))
    for role in sorted({row.role for row in (*before.pins, *after.pins)}):
        yield from _pairs(role, _pin(before, role), _pin(after, role))
    yield from _pairs("variable", dict(before.variables), dict(after.variables))
    yield from _pairs("input", _inputs(before), _inputs(after))


def _pairs(kind: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Reason]:
    for name in sorted(before.keys() | after.keys()):
        if name not in before:
            yield Reason(kind, name, None, after[name], "before")
        elif name not in after:
            yield Reason(kind, name, before[name], None, "after")
        elif is_other(before[name], after[name]):
            yield Reason(kind, name, before[name], after[name])


def flattened(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested tables by dotted path; a list is one leaf, an empty table another."""
    if isinstance(value, dict) and value:
        for name in sorted(value):
            yield from flattened(value[name], f"{place}.{name}" if place else name)
    elif place:
        yield place, value


def _recipe_files(build: BuildRecord) -> dict[str, str]:
    return {row.path: row.digest for row in build.recipe_files}


def _sources(build: BuildRecord) -> dict[str, str]:
    return {row.role: f"sha256 {row.sha256}" for row in build.sources}


def _pin(build: BuildRecord, role: str) -> dict[str, Any]:
    pin = build.pin(role)
    return {} if pin is None else {"digest": pin.digest, **pin.attributes}


def _inputs(build: BuildRecord) -> dict[str, str]:
    return {row.role: row.artifact for row in build.inputs}


def _parents(left: Manifest, right: Manifest) -> Iterator[tuple[str, Digest, Digest]]:
    """Pairs of parents in one role that differ; of two different stages the parents are no pairs."""
    before, after = _inputs(left.build), _inputs(right.build)
    for role in sorted(before.keys() & after.keys()):
        if before[role] != after[role] and left.ref == right.ref:
            yield role, Digest(before[role]), Digest(after[role])


def _environments(work: Workspace, left: Manifest, right: Manifest) -> Iterator[Reason]:
    """Equal keys, other bytes: all that is left is where they were built, as far as it was attested."""
    yield Reason("bytes", "build key", left.build.key(), right.build.key())
    sides = [_attested(work, manifest) for manifest in (left, right)]
    if not all(sides):
        left_word, right_word = ("attested" if side else "nothing attested" for side in sides)
        yield Reason("unknown", "environment", left_word, right_word)
        return
    left_facts, right_facts = (side[-1].facts for side in sides)
    yield from _pairs("environment", left_facts.environment, right_facts.environment)
    yield from _pairs("builder", left_facts.builder_version, right_facts.builder_version)
    yield from _pairs("git", left_facts.git, right_facts.git)  # what moves bytes without making them is in no key


def _attested(work: Workspace, manifest: Manifest) -> list[Statement]:
    """The build statements that are about this artifact and its key, the latest last."""
    return [s for s in work.store.attestations.of(manifest.digest) if s.key == manifest.build.key()]


def _differing_tensors(work: Workspace, left: Manifest, right: Manifest) -> tuple[str, ...] | None:
    try:
        before = {name: row.digest for name, (_, row) in tensor_rows(work.store, left).items()}
        after = {name: row.digest for name, (_, row) in tensor_rows(work.store, right).items()}
    except VpstoreError as error:
        work.narrator.warn(f"tensors cannot be compared: {error.what} ({error.where})")
        return None
    return tuple(name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name))


def _differing_files(left: Manifest, right: Manifest) -> tuple[str, ...]:
    paths = sorted(left.by_path.keys() | right.by_path.keys())
    return tuple(path for path in paths if left.by_path.get(path) != right.by_path.get(path))


def recipe_diff(work: Workspace, step: Step) -> list[str]:
    """The lines of a unified diff of every recipe file that differs.

    Raises:  BlobMissing, DigestMismatch: a recipe file is not whole.
    """
    lines: list[str] = []
    for reason in step.reasons:
        if reason.kind == "recipe" and reason.name != "entry":
            left, right = (_lines(work, digest, reason.name) for digest in (reason.before, reason.after))
            lines += difflib.unified_diff(left, right, f"before/{reason.name}", f"after/{reason.name}", lineterm="")
    return lines


def _lines(work: Workspace, digest: str | None, path: str) -> list[str]:
    if digest is None:
        return []
    return work.store.blobs.read(Digest(digest), what=f"recipe file {path}").decode(errors="replace").splitlines()


@dataclass(frozen=True)
class LockStep:
    """One artifact of a chain against what the lock says, where the lock's own is not here to compare with."""

    node: Node
    entry: LockEntry | None
    found: Agreement

    @property
    def is_root(self) -> bool:
        """Whether it differs otherwise than through its parents."""
        return self.found.standing in ("bytes", "record")

    def to_json(self) -> dict[str, Any]:
        """The step as `why --lock --json` prints it."""
        return {
            "name": self.node.name,
            "artifact": self.node.artifact,
            "lock": self.entry.artifact if self.entry else None,
            "standing": self.found.standing,
            "words": self.found.words,
            "root": self.is_root,
        }


def why_lock(lineage: Lineage, agreed: Profile) -> tuple[LockStep, ...]:
    """Every artifact of a chain that is not the lock's, parents first."""
    refs = {manifest.digest: manifest.ref for manifest in lineage.manifests}
    steps = []
    for node in lineage:
        if node.manifest is not None:
            found = agreement(node.manifest, agreed, refs)
            if found.standing != "same":
                steps.append(LockStep(node, found.entry, found))
    return tuple(steps)
