"""resolve: from a ref to the manifest of a verified artifact.

Place in the path: registry -> **resolve** -> verify. Follows the pointer, else the lock; every blob is held against its
digest, by a valid stamp or by reading.
Invariants: nothing is fetched, repaired or deleted; what is returned was whole when it was returned.

Example:
    found = resolve(work, parse_ref("vpDense")); found.manifest.files
"""

from __future__ import annotations

from dataclasses import dataclass

from vpstore.errors import BadManifest, NotLocked, VpstoreError
from vpstore.lineage import find_artifact
from vpstore.preparation import staleness
from vpstore.schema.digest import Digest, apart
from vpstore.schema.manifest import Manifest
from vpstore.schema.ref import Ref, StageRef
from vpstore.workspace import LockStatus, Workspace


@dataclass(frozen=True)
class Resolved:
    """What a ref is here and now."""

    ref: StageRef
    artifact: Digest
    manifest: Manifest
    locked: LockStatus


def resolve(work: Workspace, ref: Ref, *, locked: bool = False, full: bool = False) -> Resolved:
    """Find and verify the artifact of a ref.

    Args:    locked: refuse what is not exactly the lock's; full: read every blob, whatever the stamps say.
    Raises:  NoSuchRef, NotLocked, BlobMissing, DigestMismatch, BadManifest.
    """
    artifact = find_artifact(work, ref)
    is_named = ref.prefix is None
    stage = work.checkout.objects.find(ref) if is_named else work.store.manifest(artifact, what=str(ref)).ref
    status = work.lock_status(stage, artifact)
    if status != "same":
        _mind_the_lock(work, stage, artifact, refuse=locked)
    manifest = verified_manifest(work, stage, artifact, full=full)
    _tell_history(work, stage, artifact, status)
    if is_named:
        _refuse_forged_key(work, stage, manifest)
        _mind_staleness(work, manifest)
    return Resolved(stage, artifact, manifest, status)


def verified_manifest(
    work: Workspace, stage: StageRef, artifact: Digest, *, full: bool = False, is_input: bool = False
) -> Manifest:
    """The manifest of an artifact that must be `stage`, with every blob verified.

    Args:    is_input: verify only the files, which are all that a recipe reads of a parent; recipe files and
             intermediates of the parent may be damaged, as the build may be what mends them.
    Raises:  BlobMissing, DigestMismatch, BadManifest.
    """
    try:
        manifest = work.store.manifest(artifact, what=str(stage))
        needed = {row.digest: row.path for row in manifest.files} if is_input else manifest.blobs()
        for digest, what in needed.items() if manifest.ref == stage else ():
            work.store.blobs.ensure(digest, what=f"{stage}, {what}", full=full)
    except VpstoreError as error:
        is_known = work.store.blobs.has(artifact)
        error.advise(
            work.how_to_have(stage)
            if not is_known
            else (
                f"vpstore verify {stage} lists all damage; vpstore repair {stage} has it from a remote; "
                f"vpstore build {stage} makes it again"
            )
        )
        raise
    if manifest.ref != stage:
        raise BadManifest(
            "an artifact is of another object or stage",
            where=f"{stage}, {artifact}",
            expected=str(stage),
            found=str(manifest.ref),
            next_step=f"vpstore build {stage} writes its pointer anew; if the lock names it, the lock is wrong",
        )
    return manifest


def _refuse_forged_key(work: Workspace, stage: StageRef, manifest: Manifest) -> None:
    pointer = work.checkout.pointers.read(stage)
    key = manifest.build.key()
    if pointer is None or pointer.artifact != manifest.digest:
        return
    if pointer.content not in (None, manifest.content):
        raise BadManifest(
            "a pointer names a content that its artifact does not have",
            where=work.checkout.relative(work.checkout.pointers.path(stage)),
            expected=manifest.content,
            found=str(pointer.content),
            next_step=f"vpstore build {stage} writes it anew",
        )
    if pointer.key != key:
        raise BadManifest(
            "a pointer names a key that its artifact was not built under",
            where=work.checkout.relative(work.checkout.pointers.path(stage)),
            expected=key,
            found=pointer.key,
            next_step=f"vpstore build {stage} writes it anew",
        )


def _mind_the_lock(work: Workspace, stage: StageRef, artifact: Digest, *, refuse: bool) -> None:
    entry = work.checkout.lock().entry(work.checkout.profile, stage)
    if refuse:
        raise NotLocked(
            "not what the lock says" if entry else "the lock does not name it",
            where=f"{stage}, profile {work.checkout.profile}",
            expected=entry.artifact if entry else f"an entry in {work.checkout.config.lock}",
            found=artifact,
            next_step=f"vpstore lock {stage} to accept it, or check out the config that the lock was made from",
        )
    if entry is not None:
        here, agreed = apart(artifact, entry.artifact)
        work.narrator.warn(f"{stage} is {here}, the lock says {agreed}")


def _tell_history(work: Workspace, stage: StageRef, artifact: Digest, status: LockStatus) -> None:
    entry = work.checkout.lock().entry(work.checkout.profile, stage)
    if status == "same" and entry is not None and entry.artifact != artifact:
        here, agreed = apart(artifact, entry.artifact)
        work.narrator.note(f"{stage} is {here}: the content and key of the lock's {agreed}, with another history")


def _mind_staleness(work: Workspace, manifest: Manifest) -> None:
    try:
        reasons = staleness(work, manifest, remembered=True)
    except VpstoreError as error:
        found = f": {error.found}" if error.found else ""
        work.narrator.warn(f"{manifest.ref}: whether it is stale cannot be told: {error.what} ({error.where}{found})")
        return
    except Exception as error:  # the project's own code decides, and may give anything; the artifact stands without it
        work.narrator.warn(f"{manifest.ref}: whether it is stale cannot be told: {type(error).__name__}: {error}")
        return
    if reasons:
        work.narrator.warn(f"{manifest.ref} is stale; since it was built these changed: {'; '.join(reasons)}")
