"""resolve, ls, show, verify, doctor, open: the functions that read.

Place in the path: composes verbs into what a person calls; the command line is a skin over it.

Example:
    found = vpstore.resolve("vpDense"); found.path
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vpstore.api.targets import plain
from vpstore.schema.digest import Digest
from vpstore.schema.ref import StageRef, parse_ref
from vpstore.verbs.doctor import Diagnosis, examine
from vpstore.verbs.listing import Listed, Shown, list_built
from vpstore.verbs.listing import show as show_manifest
from vpstore.verbs.materialize import materialize, view_faults, view_path
from vpstore.verbs.reading import Artifact
from vpstore.verbs.resolve import resolve as resolve_ref
from vpstore.verbs.verify import Fault, verifiable
from vpstore.verbs.verify import verify as verify_refs
from vpstore.workspace import LockStatus, Workspace


@dataclass(frozen=True)
class ResolvedPath:
    """A verified artifact and the directory that shows it."""

    ref: StageRef
    artifact: Digest
    path: Path
    size_bytes: int
    locked: LockStatus


def resolve(ref: str, *, work: Workspace | None = None, locked: bool = False, full: bool = False) -> ResolvedPath:
    """Verify the artifact of a ref and show it as a directory.

    Args:    locked: refuse what is not the lock's; full: read every blob again.
    Raises:  NoStore, NoSuchRef, BlobMissing, DigestMismatch, BadManifest, NotLocked.
    """
    work = work or Workspace.find(Path.cwd())
    found = resolve_ref(work, parse_ref(ref), locked=locked, full=full)
    path = materialize(work, found.manifest)
    return ResolvedPath(found.ref, found.artifact, path, found.manifest.size_bytes, found.locked)


def ls(*, work: Workspace | None = None) -> list[Listed]:
    """List what is built."""
    return list(list_built(work or Workspace.find(Path.cwd())))


def show(ref: str, *, work: Workspace | None = None) -> Shown:
    """Show one artifact: manifest, parents, attestations; its blobs are verified as `resolve` does."""
    work = work or Workspace.find(Path.cwd())
    return show_manifest(work, resolve_ref(work, parse_ref(ref)).manifest)


def verify(*refs: str, work: Workspace | None = None, everything: bool = False) -> list[Fault]:
    """Read everything again, views too, and list all faults.

    Args:    refs: none means every ref; everything: also what in the store no ref leads to.
    """
    work = work or Workspace.find(Path.cwd())
    stages = [work.checkout.objects.find(plain(ref)) for ref in refs] or list(verifiable(work))
    faults = set(verify_refs(work, stages, everything=everything))
    sound = [stage for stage in stages if not any(fault.where.startswith(f"{stage}:") for fault in faults)]
    for stage in sound:
        faults.update(_view_faults(work, stage))
    return sorted(faults)


def doctor(*, profile: str | None = None) -> Diagnosis:
    """Examine checkout, store and surroundings."""
    return examine(Path.cwd(), profile=profile)


def open(ref: str, *, work: Workspace | None = None) -> Artifact:
    """The tensors of an artifact by name, each verified as it is read.

    Raises:  as `resolve`.
    """
    work = work or Workspace.find(Path.cwd())
    return Artifact(work, resolve_ref(work, parse_ref(ref)).manifest)


def _view_faults(work: Workspace, stage: StageRef) -> list[Fault]:
    """What a present view shows wrongly; an absent one is made again by resolve and is no fault."""
    pointer = work.checkout.pointers.read(stage)
    if pointer is None:
        return []
    manifest = work.store.manifest(pointer.artifact)
    view = view_path(work, manifest)
    if not view.exists():
        return []
    where = f"{stage}: view {work.checkout.relative(view)}"
    return [
        Fault(f"{where}/{path}", "the artifact's file", "missing, changed or foreign")
        for path in view_faults(work, manifest, full=True)
    ]
