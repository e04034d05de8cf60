"""audit, graph, why, diff: the functions a reviewer calls.

Place in the path: composes verbs into what a person calls; the command line is a skin over it.

Example:
    report = vpstore.api.audit("vpMoE"); report.is_ok
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpstore.errors import BlobMissing, NoSuchRef, UsageError
from vpstore.lineage import Lineage, find_artifact, walk, walk_all
from vpstore.schema.digest import Digest
from vpstore.schema.lockfile import LockEntry, Profile
from vpstore.schema.manifest import Manifest
from vpstore.schema.ref import parse_ref
from vpstore.verbs.audit import Audit, Strictness
from vpstore.verbs.audit import audit as audit_ref
from vpstore.verbs.diff import Difference
from vpstore.verbs.diff import diff as diff_manifests
from vpstore.verbs.graph import document, dot
from vpstore.verbs.reading import Artifact
from vpstore.verbs.why import Explanation, LockStep, Step, recipe_diff, why_lock
from vpstore.verbs.why import why as why_lineages
from vpstore.workspace import Workspace

__all__ = ["Graph", "LockExplanation", "Strictness", "audit", "diff", "graph", "why", "why_recipe"]


@dataclass(frozen=True)
class Graph:
    """A lineage and the lock's entries to show it with."""

    lineage: Lineage
    agreed: Profile

    def document(self) -> dict[str, Any]:
        """The lineage as JSON."""
        return document(self.lineage, self.agreed)

    def dot(self) -> str:
        """The lineage for Graphviz."""
        return dot(self.lineage, self.agreed)


@dataclass(frozen=True)
class LockExplanation:
    """Why an artifact is not the lock's, where the lock's own is not here."""

    top: Manifest
    entry: LockEntry
    steps: tuple[LockStep, ...]  # parents first; none if the artifact is the lock's

    def to_json(self) -> dict[str, Any]:
        """The document as `why --lock --json` prints it."""
        steps = [step.to_json() for step in self.steps]
        return {"same": not steps, "lock": self.entry.artifact, "steps": steps}


def audit(ref: str, *, work: Workspace | None = None, strictness: Strictness | None = None) -> Audit:
    """Audit an artifact and everything that it was made from.

    Args:    strictness: what counts as a fault besides what contradicts itself.
    Raises:  NoStore, NoSuchRef, UsageError.
    """
    work = work or Workspace.find(Path.cwd())
    return audit_ref(work, parse_ref(ref), strictness or Strictness())


def graph(ref: str, *, work: Workspace | None = None) -> Graph:
    """The lineage of an artifact.

    Raises:  NoStore, NoSuchRef, BadManifest: a damaged pointer.
    """
    work = work or Workspace.find(Path.cwd())
    agreed = work.checkout.lock().profiles.get(work.checkout.profile, {})
    return Graph(walk(work.store, find_artifact(work, parse_ref(ref))), agreed)


def why(
    before: str, after: str | None = None, *, work: Workspace | None = None, lock: bool = False
) -> Explanation | LockExplanation:
    """What makes two artifacts different.

    Args:    after: none with `lock`, which compares what the lock names (before) with what is here (after).
    Raises:  NoSuchRef, UsageError, BlobMissing, DigestMismatch, BadManifest: one of the two manifests is not here, or
             not whole.
    """
    work = work or Workspace.find(Path.cwd())
    here, agreed = _sides(work, before, after, lock=lock)
    if lock and not work.store.blobs.has(agreed):
        return _why_lock(work, walk(work.store, here))
    first, second = (agreed, here) if lock else (here, agreed)
    for artifact, ref in zip((first, second), _names(before, after), strict=True):
        _manifest(work, artifact, ref)  # without it there is nothing to compare; of ancestors it is told
    return why_lineages(work, *walk_all(work.store, [first, second]))


def why_recipe(step: Step, *, work: Workspace | None = None) -> list[str]:
    """The lines of a unified diff of the recipe files that differ in one step of an explanation."""
    return recipe_diff(work or Workspace.find(Path.cwd()), step)


def diff(before: str, after: str | None = None, *, work: Workspace | None = None, lock: bool = False) -> Difference:
    """Compare two artifacts tensor by tensor and file by file.

    Args:    after: none with `lock`, which compares what the lock names (before) with what is here (after).
    Raises:  NoSuchRef, UsageError, BlobMissing, DigestMismatch, BadManifest.
    """
    work = work or Workspace.find(Path.cwd())
    here, other = _sides(work, before, after, lock=lock)
    sides = (other, here) if lock else (here, other)
    left, right = (_manifest(work, artifact, ref) for artifact, ref in zip(sides, _names(before, after), strict=True))
    return diff_manifests(work, left, right, tensors=(Artifact(work, left), Artifact(work, right)))


def _sides(work: Workspace, before: str, after: str | None, *, lock: bool) -> tuple[Digest, Digest]:
    """The artifact of the first ref, and the one of the second or of the lock."""
    if lock == (after is not None):
        raise UsageError(
            "two refs, or one and the lock",
            expected="A B, or A --lock",
            next_step=f"add a second ref, or {before} --lock",
        )
    first = find_artifact(work, parse_ref(before))
    if after is not None:
        return first, find_artifact(work, parse_ref(after))
    ref = _manifest(work, first, before).ref
    entry = work.checkout.lock().entry(work.checkout.profile, ref)
    if entry is None:
        raise NoSuchRef(
            "the lock does not name it",
            where=f"{ref}, profile {work.checkout.profile}",
            next_step=f"vpstore lock {ref} accepts what is here",
        )
    return first, entry.artifact


def _names(before: str, after: str | None) -> tuple[str, str]:
    return (before, before) if after is None else (before, after)


def _manifest(work: Workspace, artifact: Digest, text: str) -> Manifest:
    """The manifest of what a ref means; if it is not here, the error says how to have it."""
    try:
        return work.store.manifest(artifact, what=text)
    except BlobMissing as error:
        if parse_ref(text).prefix is None:
            error.next_step = work.how_to_have(work.checkout.objects.find(parse_ref(text)))
        raise


def _why_lock(work: Workspace, lineage: Lineage) -> LockExplanation:
    agreed = work.checkout.lock().profiles.get(work.checkout.profile, {})
    top = work.store.manifest(lineage.top)
    return LockExplanation(top, agreed[top.ref], why_lock(lineage, agreed))
