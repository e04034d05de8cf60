"""Registry: whether lock, pointers and key files say of an artifact what its manifest says.

Place in the path: evidence from the checkout and from the store's index. The lock, which git keeps, is the one witness
here that somebody who may write the store cannot change unseen.
Invariants: an artifact that is not the lock's is compared with what the lock would have to say if only its ancestors
were others; two artifacts of one key are told, whichever of them is agreed. The lock in the working tree, which whoever
forges an artifact can edit as well, is held against the committed one in evidence.anchors.

Example:
    check_lock(dossier, manifest, agreed, refs); check_pointer(dossier, manifest, work)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from vpstore.checkout import Checkout
from vpstore.errors import VpstoreError
from vpstore.evidence.dossier import LOCK, Dossier, Standing, Vouched
from vpstore.schema.digest import Digest
from vpstore.schema.lockfile import LockEntry, Profile
from vpstore.schema.manifest import InputRecord, Manifest
from vpstore.schema.ref import StageRef
from vpstore.storage.store import Store
from vpstore.workspace import Workspace

Refs = Mapping[Digest, StageRef]  # what each artifact of a chain was built as


class Agreement(NamedTuple):
    """How an artifact stands to the lock, and in words what differs."""

    standing: Standing
    words: str
    entry: LockEntry | None


def agreement(manifest: Manifest, agreed: Profile, refs: Refs) -> Agreement:
    """Compare an artifact with the lock's entry for its object and stage.

    Args:    agreed: the lock's entries of the profile; refs: of the artifact's parents.
    """
    entry, own = agreed.get(manifest.ref), LockEntry.of(manifest)
    if entry is None:
        return Agreement("absent", "not in the lock", None)
    if entry.artifact == own.artifact:
        return Agreement("same", "as the lock says", entry)
    if entry.is_kept_by(own):
        return Agreement("same", "as the lock says, with another history", entry)
    if entry.key == own.key:
        return Agreement("bytes", "the lock's own key, other bytes", entry)
    if entry.key == _with_agreed_parents(manifest, agreed, refs).build.key():
        return Agreement("inputs", "as the lock says but for its parents", entry)
    parts = [part for part in ("code", "params") if getattr(entry, part) != getattr(own, part)]
    return Agreement("record", f"other {' and '.join(parts) or 'inputs, sources or pins'}", entry)


def _with_agreed_parents(manifest: Manifest, agreed: Profile, refs: Refs) -> Manifest:
    """The manifest with each parent replaced by what the lock says that parent should be."""
    inputs: list[InputRecord] = []
    for row in manifest.build.inputs:
        entry = agreed.get(refs[row.artifact]) if row.artifact in refs else None
        content = row.content if entry is None or entry.content is None else entry.content
        inputs.append(row if entry is None else row._replace(artifact=entry.artifact, content=content))
    return replace(manifest, build=replace(manifest.build, inputs=tuple(inputs)))


def check_lock(dossier: Dossier, manifest: Manifest, agreed: Profile, refs: Refs) -> None:
    """Give the artifact its standing, and hold the parts of its lock entry against one another."""
    found = agreement(manifest, agreed, refs)
    dossier.standing = found.standing
    if found.entry is None or found.standing == "record":
        return
    if found.standing == "same" and found.entry.artifact != manifest.digest:
        dossier.remark(
            "the lock's key and content, with another history: other ancestors, or other comments in a recipe"
        )
    own = LockEntry.of(manifest)
    parts = ["code", "params"] if found.standing == "inputs" else ["key", "code", "params"]
    if found.standing == "same" and found.entry.content is not None:
        parts.append("content")
    for part in parts:
        expected, said = getattr(own, part), getattr(found.entry, part)
        if expected != said:
            what = "the lock contradicts itself" if found.standing != "same" else "the lock contradicts the artifact"
            dossier.fault("registry", f"lock, {part} ({what})", expected=expected, found=said)


def vouched(dossier: Dossier, manifest: Manifest, agreed: Profile, store: Store) -> Vouched:
    """Who vouches for this very artifact, history included; its statements were read before."""
    entry = agreed.get(manifest.ref)
    if entry is not None and entry.artifact == manifest.digest:
        return "locked"
    if dossier.signers:
        return "signed"
    again = store.attestations.reproductions(manifest.digest)
    return "reproduced" if any(one.outcome.result == "PASSED" for one in again) else "claimed"


def standing_fault(dossier: Dossier, manifest: Manifest, agreed: Profile, refs: Refs, store: Store) -> None:
    """List that an artifact is not the lock's."""
    found = agreement(manifest, agreed, refs)
    expected = "an entry" if found.entry is None else found.entry.artifact
    here = found.entry is not None and store.blobs.has(found.entry.artifact)
    also = "; the lock's artifact is in this store, too" if here else ""
    dossier.fault(LOCK, "lock", expected=expected, found=f"{manifest.digest}: {found.words}{also}")


def check_pointer(dossier: Dossier, manifest: Manifest, work: Workspace) -> None:
    """Hold the checkout's pointer of this object and stage, if it is about this artifact, against the manifest."""
    path = work.checkout.relative(work.checkout.pointers.path(manifest.ref))
    try:
        pointer = work.checkout.pointers.read(manifest.ref)
    except VpstoreError as error:
        dossier.fault("registry", path, expected=error.expected or "a sound pointer", found=error.found or error.what)
        return
    key = manifest.build.key()
    if pointer is None or pointer.artifact != manifest.digest:
        return
    if pointer.key != key:
        dossier.fault("registry", f"{path}, key", expected=key, found=pointer.key)
    if pointer.content not in (None, manifest.content):
        dossier.fault("registry", f"{path}, content", expected=manifest.content, found=str(pointer.content))


def check_key(dossier: Dossier, manifest: Manifest, store: Store) -> None:
    """The key file of this artifact must be there; other artifacts under the same key are told."""
    key = manifest.build.key()
    folder = store.keys.folder(key)
    if not (folder / manifest.digest.hex).is_file():
        dossier.fault("registry", "key file", expected=f"{key} -> {manifest.digest}", found="missing")
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            _, other = store.keys.read(path)
        except (VpstoreError, OSError) as error:
            found = error.found or error.what if isinstance(error, VpstoreError) else str(error.strerror)
            dossier.fault("registry", f"key file {path.name[:12]}", expected="a sound key file", found=found)
            continue
        if other != manifest.digest:
            _tell_other(dossier, key, other, store)


def _tell_other(dossier: Dossier, key: Digest, other: Digest, store: Store) -> None:
    try:
        manifest = store.manifest(other)
    except VpstoreError:
        dossier.remark(f"key {key.short} is said to have also given {other.short}, which is not here")
        return
    actual = manifest.build.key()
    if actual != key:
        dossier.fault("registry", f"key file {other.short}", expected=f"{actual} -> {other}", found=f"{key} -> {other}")
    elif dossier.manifest is None or manifest.content != dossier.manifest.content:
        dossier.remark(f"key {key.short} has also given {other.short}: the build does not reproduce, or one is forged")


def read_lock(checkout: Checkout) -> tuple[Profile, str]:
    """The lock's entries of this profile, and what is wrong with the lock, "" if nothing."""
    try:
        return checkout.lock().profiles.get(checkout.profile, {}), ""
    except VpstoreError as error:
        return {}, f"{error.what}: {error.found}" if error.found else error.what
