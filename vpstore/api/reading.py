"""resolve, ls, show, verify, doctor, open: the functions that read.

Place in the path: composes verbs into what a person calls; the command line is a skin over it.

Example:
    found = vpstore.resolve("vpDense"); found.path
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpstore.api.targets import plain
from vpstore.errors import NoSuchTensor, UsageError
from vpstore.schema.digest import Digest
from vpstore.schema.ref import StageRef, parse_ref
from vpstore.verbs.materialize import materialize, view_faults, view_path
from vpstore.verbs.resolve import resolve as resolve_ref
from vpstore.workspace import LockStatus, Workspace

# What resolve does not need is imported where it is used: resolve should cost a fifth of a second.
if TYPE_CHECKING:
    from vpstore.schema.fault import Fault
    from vpstore.verbs.doctor import Diagnosis
    from vpstore.verbs.listing import Listed, Shown
    from vpstore.verbs.reading import Artifact


@dataclass(frozen=True)
class ResolvedPath:
    """A verified artifact and the directory that shows it."""

    ref: StageRef
    artifact: Digest
    path: Path
    size_bytes: int
    locked: LockStatus

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)  # many libraries take the text of what they are given for a path

    def to_json(self) -> dict[str, Any]:
        """The document as `resolve --json` prints it."""
        return {
            "ref": str(self.ref),
            "artifact": self.artifact,
            "path": str(self.path),
            "size_bytes": self.size_bytes,
            "locked": self.locked,
        }


@dataclass(frozen=True)
class Verified:
    """What was read again, and everything that is wrong with it."""

    place: str  # "the store ..." or "the remote ...", for messages
    faults: tuple[Fault, ...]  # sorted

    @property
    def is_ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        """The document as `verify --json` prints it."""
        return {"ok": self.is_ok, "place": self.place, "faults": [fault.to_json() for fault in self.faults]}


def resolve(
    ref: str,
    *,
    work: Workspace | None = None,
    locked: bool = False,
    full: bool = False,
    fetch: bool | str = False,
    checkout: str | os.PathLike[str] | None = None,
) -> ResolvedPath:
    """Verify the artifact of a ref and show it as a directory.

    What it gives is a path itself: hand it to whatever opens directories.

    Args:    locked: refuse what is not the lock's; full: read every blob again; fetch: have what is missing of it from
             the default DVC remote, or from the one of this name; without it nothing is ever fetched; checkout: a
             folder in the checkout that is meant, instead of the working directory.
    Raises:  NoStore, NoSuchRef, BlobMissing, DigestMismatch, BadManifest, NotLocked; RemoteFailure.
    """
    work = _workspace(work, checkout, create=fetch is not False)
    if fetch is not False:
        from vpstore.api import sharing

        sharing.fetch(parse_ref(ref), work=work, remote=fetch if isinstance(fetch, str) else None, locked=locked)
    with work.changing():  # an artifact that no root leads to yet stays until its view does
        found = resolve_ref(work, parse_ref(ref), locked=locked, full=full)
        path = materialize(work, found.manifest)
    return ResolvedPath(found.ref, found.artifact, path, found.manifest.size_bytes, found.locked)


def ls(*, work: Workspace | None = None) -> list[Listed]:
    """List what is built."""
    from vpstore.verbs.listing import list_built

    return list(list_built(work or Workspace.find(Path.cwd())))


def show(ref: str, *, work: Workspace | None = None, tensors: bool = False) -> Shown:
    """Show one artifact: manifest, parents, attestations; its blobs are verified as `resolve` does.

    Args:    tensors: its tensors too, from its tables.
    """
    from vpstore.verbs.listing import show as show_manifest

    work = work or Workspace.find(Path.cwd())
    return show_manifest(work, resolve_ref(work, parse_ref(ref)).manifest, tensors=tensors)


def verify(
    *refs: str,
    work: Workspace | None = None,
    everything: bool = False,
    quick: bool = False,
    remote: bool | str = False,
) -> Verified:
    """Read everything again, views too, and list all faults.

    Args:    refs: none means every ref; everything: also what in the store no ref leads to; quick: believe valid stat
             stamps for the bytes of blobs and copies; remote: read back what the default DVC remote, or the one of
             this name, has of the refs and of all they were built from, instead of the store.
    """
    from vpstore.verbs.verify import verifiable
    from vpstore.verbs.verify import verify as verify_refs

    work = work or Workspace.find(Path.cwd())
    if remote is not False:
        from vpstore.api import sharing

        name = remote if isinstance(remote, str) else None
        return Verified(*sharing.verify_remote(*refs, work=work, remote=name, everything=everything))
    stages = [work.checkout.objects.find(plain(ref)) for ref in refs] or list(verifiable(work))
    with work.changing():  # a blob that gc removed after it was listed is no fault
        faults = set(verify_refs(work, stages, everything=everything, quick=quick))
    sound = [stage for stage in stages if not any(fault.where.startswith(f"{stage}:") for fault in faults)]
    for stage in sound:
        faults.update(_view_faults(work, stage, full=not quick))
    return Verified(f"the store {work.checkout.relative(work.store.root)}", tuple(sorted(faults)))


def doctor(*, profile: str | None = None) -> Diagnosis:
    """Examine checkout, store and surroundings."""
    from vpstore.verbs.doctor import examine

    return examine(Path.cwd(), profile=profile)


def open(ref: str, *, work: Workspace | None = None, checkout: str | os.PathLike[str] | None = None) -> Artifact:
    """The tensors of an artifact by name, each verified as it is read, and an array on request.

    Args:    checkout: a folder in the checkout that is meant, instead of the working directory.
    Raises:  NoSuchTensor: the artifact holds no tensors at all; as `resolve`.
    """
    from vpstore.verbs.reading import Artifact

    work = _workspace(work, checkout)
    manifest = resolve_ref(work, parse_ref(ref)).manifest
    if not any(file.tensors is not None for file in manifest.files):
        raise NoSuchTensor(
            "the artifact holds no tensors",
            where=str(manifest.ref),
            expected="an artifact with safetensors files",
            found=f"{len(manifest.files)} files of other kinds",
            next_step=f"vpstore show {manifest.ref} lists them; vpstore.resolve({str(manifest.ref)!r}) is their folder",
        )
    return Artifact(work, manifest)


def _workspace(work: Workspace | None, checkout: str | os.PathLike[str] | None, *, create: bool = False) -> Workspace:
    """The one that is given, or the one around a folder."""
    if work is not None and checkout is not None:
        raise UsageError("work and checkout name two places", expected="one of them", next_step="leave one out")
    return work or Workspace.find(Path(checkout) if checkout is not None else Path.cwd(), create=create)


def _view_faults(work: Workspace, stage: StageRef, *, full: bool) -> list[Fault]:
    """What a present view shows wrongly; an absent one is made again by resolve and is no fault."""
    from vpstore.schema.fault import Fault

    pointer = work.checkout.pointers.read(stage)
    if pointer is None:
        return []
    manifest = work.store.manifest(pointer.artifact)
    view = view_path(work, manifest)
    if not os.path.lexists(view):
        return []
    where = f"{stage}: view {work.checkout.relative(view)}"
    return [
        Fault(f"{where}/{path}", "the artifact's file", "missing, changed or foreign")
        if path
        else Fault(where, "a folder that shows the artifact", "a symbolic link" if view.is_symlink() else "no folder")
        for path in view_faults(work, manifest, full=full)
    ]
