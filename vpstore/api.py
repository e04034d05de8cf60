"""The Python API: one function a command.

Place in the path: composes verbs into what a person calls; the command line is a skin over this module.
Invariants: every function finds its workspace around the working directory unless one is given; nothing is printed.

Example:
    found = vpstore.resolve("vpDense"); found.path
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpstore.building import Built, planned_key
from vpstore.building import build as build_stage
from vpstore.errors import UsageError
from vpstore.schema.digest import Digest
from vpstore.schema.ref import Ref, StageRef, parse_ref
from vpstore.verbs.doctor import Diagnosis, examine
from vpstore.verbs.importing import relocate
from vpstore.verbs.listing import Listed, Shown, list_built
from vpstore.verbs.listing import show as show_manifest
from vpstore.verbs.lock import LockChange, LockFault, check_lock, lock_refs
from vpstore.verbs.materialize import materialize, view_faults, view_path
from vpstore.verbs.reading import Artifact
from vpstore.verbs.reports import summary_value
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


@dataclass(frozen=True)
class SummaryRow:
    """One line of the table that `build --all` ends with."""

    built: Built
    is_new: bool  # built in this run, or since the moment that was given
    figure: Any  # of [summary] in objects.toml; None if there is none


def resolve(ref: str, *, work: Workspace | None = None, locked: bool = False, full: bool = False) -> ResolvedPath:
    """Verify the artifact of a ref and show it as a directory.

    Args:    locked: refuse what is not the lock's; full: read every blob again.
    Raises:  NoStore, NoSuchRef, BlobMissing, DigestMismatch, BadManifest, NotLocked.
    """
    work = work or Workspace.find(Path.cwd())
    found = resolve_ref(work, parse_ref(ref), locked=locked, full=full)
    path = materialize(work, found.manifest)
    return ResolvedPath(found.ref, found.artifact, path, found.manifest.size_bytes, found.locked)


def build(*refs: str, work: Workspace | None = None, force: bool = False) -> list[Built]:
    """Build stages in the order given.

    Args:    refs: an object alone means its default stage, or all its stages if objects.toml says `build_all`.
    Raises:  NoSuchRef, RecipeRefused, GateMissed, Interrupted.
    """
    work = work or Workspace.find(Path.cwd(), create=True)
    return [build_stage(work, stage, force=force) for stage in _targets(work, refs)]


def build_all(
    *, work: Workspace | None = None, force: bool = False, since: float | None = None
) -> Iterator[SummaryRow]:
    """Build every stage in topological order.

    Args:    since: a Unix time; builds that were attested from then on count as new, too.
    Returns: one row a stage, in that order, after all of them are built, as the figures come from reports.
    """
    work = work or Workspace.find(Path.cwd(), create=True)
    done = [build_stage(work, stage, force=force) for stage in work.checkout.objects.order]
    summary = work.checkout.objects.summary
    for built in done:
        is_new = not built.is_cached or (since is not None and built.finished_unix >= int(since))
        yield SummaryRow(built, is_new, None if summary is None else summary_value(work, built.ref, summary))


def plan(*refs: str, work: Workspace | None = None) -> list[tuple[StageRef, Digest, bool]]:
    """What `build` would do: each stage, its key, and whether the cache has its result."""
    work = work or Workspace.find(Path.cwd())
    stages = _targets(work, refs) if refs else list(work.checkout.objects.order)
    return [(stage, *planned_key(work, stage)) for stage in stages]


def import_donor(name: str, path: Path, *, work: Workspace | None = None, force: bool = False) -> Built:
    """Build an object from files in a folder of the person's choice, held against the pinned SHA-256 as ever.

    Args:    name: the object, or object@stage; path: the folder with the files.
    Raises:  UsageError, RecipeRefused.
    """
    work = work or Workspace.find(Path.cwd(), create=True)
    stage = work.checkout.objects.find(parse_ref(name))
    folder = path.expanduser().absolute()
    return build_stage(work, stage, force=force, relocate=lambda prepared: relocate(prepared, folder))


def ls(*, work: Workspace | None = None) -> list[Listed]:
    """List what is built."""
    return list(list_built(work or Workspace.find(Path.cwd())))


def show(ref: str, *, work: Workspace | None = None) -> Shown:
    """Show one artifact: manifest, parents, attestations; its blobs are verified as `resolve` does."""
    work = work or Workspace.find(Path.cwd())
    return show_manifest(work, resolve_ref(work, parse_ref(ref)).manifest)


def lock(*refs: str, work: Workspace | None = None, is_dry_run: bool = False) -> list[LockChange]:
    """Accept what is built; without refs, everything."""
    work = work or Workspace.find(Path.cwd())
    return list(lock_refs(work, _targets(work, refs), is_dry_run=is_dry_run))


def lock_check(*, work: Workspace | None = None) -> list[LockFault]:
    """Hold the working tree's code and params against the lock."""
    return list(check_lock(work or Workspace.find(Path.cwd())))


def verify(*refs: str, work: Workspace | None = None, everything: bool = False) -> list[Fault]:
    """Read everything again, views too, and list all faults.

    Args:    refs: none means every ref; everything: also what in the store no ref leads to.
    """
    work = work or Workspace.find(Path.cwd())
    stages = [work.checkout.objects.find(_plain(ref)) for ref in refs] or list(verifiable(work))
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


def _targets(work: Workspace, refs: Sequence[str]) -> list[StageRef]:
    return list(dict.fromkeys(stage for ref in refs for stage in work.checkout.objects.targets(_plain(ref))))


def _plain(text: str) -> Ref:
    ref = parse_ref(text)
    if ref.prefix is not None:
        raise UsageError("this command wants a name, not a digest", where=text, expected="object[.mode][@stage]")
    return ref


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
