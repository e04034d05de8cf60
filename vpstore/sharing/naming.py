"""Which artifacts the refs of a command mean, here and on a remote.

Place in the path: first step of push, pull, repair and `verify --remote`. Push asks what is built here, pull what was
agreed, the others what `resolve` would say.
Invariants: a manifest is held against the ref and the lock entry that lead to it before anything follows from it.

Example:
    wanted = agreed(work, None); names, failures = rightly_named(wanted, RemoteReader(work.store, remote))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vpstore.errors import BadManifest, BlobMissing, DigestMismatch, NoSuchRef, VpstoreError
from vpstore.schema.digest import Digest
from vpstore.schema.lockfile import LockEntry
from vpstore.schema.manifest import Manifest
from vpstore.schema.ref import Ref, StageRef
from vpstore.sharing.plan import ReadManifest, Wanted, fetch_manifest
from vpstore.storage.prefixes import FULL_DIGITS, by_prefix, only
from vpstore.storage.remotes.base import Remote
from vpstore.workspace import Workspace


def built_here(work: Workspace, stages: Iterable[StageRef], failures: list[VpstoreError] | None = None) -> list[Wanted]:
    """What each stage is here: the pointer's artifact, and the lock's where that is another one and is in the store.

    Args:    failures: takes what is wrong with pointers, so that the other stages are gone on with.
    Raises:  BadManifest: a damaged lock; without `failures`, also a damaged pointer.
    """
    found, lock = [], work.checkout.lock()
    for ref in stages:
        try:
            pointer = work.checkout.pointers.read(ref)
        except VpstoreError as error:
            if failures is None:
                raise
            failures.append(error)
            continue
        entry = lock.entry(work.checkout.profile, ref)
        if pointer is not None:
            same = entry if entry is not None and entry.artifact == pointer.artifact else None
            found.append(Wanted(pointer.artifact, str(ref), ref, same))
        if entry is None or (pointer is not None and pointer.artifact == entry.artifact):
            continue
        if work.store.blobs.has(entry.artifact):
            label = str(ref) if pointer is None else f"{ref} of the lock"
            found.append(Wanted(entry.artifact, label, ref, entry))
    return found


def named_all(work: Workspace, stages: Iterable[StageRef], failures: list[VpstoreError]) -> list[Wanted]:
    """As `named`, for many: what is wrong with one pointer goes to `failures` and keeps nobody from the others.

    Raises:  NoSuchRef: nothing leads to one of them; BadManifest: a damaged lock.
    """
    found = []
    work.checkout.lock()
    for ref in stages:
        try:
            found.append(named(work, ref))
        except NoSuchRef:
            raise
        except VpstoreError as error:
            failures.append(error)
    return found


def agreed(work: Workspace, stages: Sequence[StageRef] | None) -> list[Wanted]:
    """What each stage should be: the lock's artifact, else the pointer's.

    Args:    stages: None means every stage that the lock of this profile names.
    Raises:  NoSuchRef: neither names one, or the lock names nothing at all.
    """
    entries = work.checkout.lock().profiles.get(work.checkout.profile, {})
    if stages is None:
        if not entries:
            raise NoSuchRef(
                "the lock names nothing",
                where=f"{work.checkout.relative(work.checkout.lock_path)}, profile {work.checkout.profile}",
                next_step="`vpstore lock` where it was built, then commit the lock; or name a ref",
            )
        order = [ref for ref in work.checkout.objects.order if ref in entries]
        stages = order + sorted(set(entries) - set(order), key=str)
    return [_agreed(work, ref) for ref in stages]


def _agreed(work: Workspace, ref: StageRef) -> Wanted:
    entry = work.checkout.lock().entry(work.checkout.profile, ref)
    if entry is not None:
        return Wanted(entry.artifact, str(ref), ref, entry)
    return named(work, ref)


def named(work: Workspace, ref: StageRef) -> Wanted:
    """What `resolve` takes a stage for: the pointer's artifact, else the lock's.

    Raises:  NoSuchRef: neither; BadManifest: a damaged pointer or lock.
    """
    pointer = work.checkout.pointers.read(ref)
    entry = work.checkout.lock().entry(work.checkout.profile, ref)
    if pointer is not None:
        is_agreed = entry is not None and entry.artifact == pointer.artifact
        return Wanted(pointer.artifact, str(ref), ref, entry if is_agreed else None)
    if entry is not None:
        return Wanted(entry.artifact, str(ref), ref, entry)
    raise NoSuchRef(
        "nothing is built or locked under this name",
        where=f"{ref}, profile {work.checkout.profile}",
        next_step=f"vpstore build {ref}, or git pull a lock that names it",
    )


def here_by_prefix(work: Workspace, ref: Ref) -> Wanted:
    """The artifact of this store that a digest prefix means.

    Raises:  NoSuchRef: none, or several.
    """
    return _by_digits(ref, by_prefix(work.store, ref))


def there_by_prefix(remote: Remote, ref: Ref) -> Wanted:
    """The attested artifact of a remote that a digest prefix means; whether it is `object`'s, its manifest will say.

    Raises:  NoSuchRef: none, or several; RemoteFailure.
    """
    prefix = str(ref.prefix)
    if len(prefix) == FULL_DIGITS:
        return _by_digits(ref, Digest.from_hex(prefix))
    folders = {name.split("/")[1] for name, _ in remote.list("attestations/") if name.count("/") == 2}
    found = []
    for folder in sorted(folders):
        if not folder.startswith(prefix):
            continue
        try:
            artifact = Digest.from_hex(folder)
            if fetch_manifest(remote, artifact, str(ref)).object == ref.object:
                found.append(artifact)
        except (BlobMissing, DigestMismatch, BadManifest):  # what cannot be an artifact is none
            continue
    return _by_digits(ref, only(ref, found, remote.label))


def _by_digits(ref: Ref, artifact: Digest) -> Wanted:
    return Wanted(artifact, str(ref), object=ref.object, is_exact=len(str(ref.prefix)) == FULL_DIGITS)


def rightly_named(wanted: Sequence[Wanted], read: ReadManifest) -> tuple[dict[Digest, str], list[VpstoreError]]:
    """Read the manifests of what is wanted and hold each against the name that leads to it.

    Returns: the artifacts whose names are right, and what is wrong with the others.
    Raises:  RemoteFailure: of the reader.
    """
    names: dict[Digest, str] = {}
    failures: list[VpstoreError] = []
    for row in wanted:
        try:
            hold_to_name(row, read(row.artifact, row.label))
            names.setdefault(row.artifact, row.label)
        except (BlobMissing, DigestMismatch, BadManifest) as error:
            if not error.where.startswith(row.label):
                error.where = f"{row.label}: {error.where}"
            failures.append(error)
    return names, failures


def hold_to_name(wanted: Wanted, manifest: Manifest) -> None:
    """Hold a manifest against the ref and the lock entry that lead to it.

    Raises:  BadManifest: another object or stage, or not what the lock says of key, code and params.
    """
    is_other_object = wanted.object is not None and manifest.object != wanted.object
    if is_other_object or (wanted.ref is not None and manifest.ref != wanted.ref):
        raise BadManifest(
            "an artifact is of another object or stage",
            where=f"{wanted.label}, {wanted.artifact}",
            expected=str(wanted.ref or wanted.object),
            found=str(manifest.ref),
            next_step=_right_name(wanted, manifest),
        )
    if wanted.entry is not None and (found := LockEntry.of(manifest)) != wanted.entry:
        differing = [name for name, a, b in zip(found._fields, wanted.entry, found, strict=True) if a != b]
        raise BadManifest(
            "a lock entry contradicts the manifest that it names",
            where=f"{wanted.label}, {wanted.artifact}",
            expected=", ".join(f"{name} {getattr(wanted.entry, name).short}" for name in differing),
            found=", ".join(f"{name} {getattr(found, name).short}" for name in differing),
            next_step="look at the history of the lock: it was not written by `vpstore lock`",
        )


def _right_name(wanted: Wanted, manifest: Manifest) -> str:
    """What to do about a name that leads to the artifact of another: the artifact itself may be whole."""
    if wanted.entry is not None:
        return (
            f"the lock's entry of {wanted.label} is wrong: look at its history and `git restore` it, or "
            f"`vpstore lock {wanted.label}` where the right one is built"
        )
    if wanted.ref is not None:
        return f"vpstore build {wanted.ref} writes the pointer anew"
    return f"call it {manifest.object}#{manifest.digest.hex[:12]}"
