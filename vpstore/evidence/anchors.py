"""Anchors: whether the lock and the trusted keys that an audit believes are the ones that were committed.

Place in the path: the lock in git's HEAD and the keys there are what somebody who may write the store and the checkout,
but not its history, cannot change; what lies in the working tree is held against them here.
Invariants: an anchor that cannot be had is told, never passed over; a key counts only as HEAD has it, wherever HEAD can
be read; other bytes under a key of the committed lock are a fault under whatever profile it names them.

Example:
    doubts = anchors.doubts(work.checkout, committed, keys); anchors.check_committed(dossier, manifest, agreed, ...)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from vpstore.checkout import Checkout
from vpstore.errors import UsageError
from vpstore.evidence.committed import CONFIG_FILE, Committed
from vpstore.evidence.dossier import LOCK, STALE, Dossier, Finding, Rival
from vpstore.schema.lockfile import LockEntry, Lockfile, Profile
from vpstore.schema.manifest import Manifest
from vpstore.signatures import TrustedKey, load_trusted_key
from vpstore.storage.store import Store

HEAD = "git's HEAD"


class Doubt(NamedTuple):
    """What a person should know about the anchors themselves, and the strictness that makes a fault of it."""

    remark: str
    finding: Finding
    options: tuple[str, ...]  # fields of `Strictness`


def doubts(checkout: Checkout, committed: Committed, keys: Sequence[TrustedKey]) -> Iterator[Doubt]:
    """Everything that keeps the committed lock and keys from vouching for the ones that are here."""
    lock = checkout.config.lock
    if not committed.is_repository:
        remark = f"not in a git repository: nothing outside the working tree vouches for {lock} and the trusted keys"
        yield Doubt(remark, Finding(HEAD), ())
    elif committed.fault is not None:
        found, expected = str(committed.fault.found), f"the committed {lock} and trusted keys, to compare with"
        remark = (
            f"what is committed is not known, so nothing was compared with it: {found} ({committed.fault.next_step})"
        )
        yield Doubt(remark, Finding(HEAD, expected, found, kind=LOCK), ("locked", "worktree", "signed"))
    else:
        if committed.lock is None and checkout.lock_path.exists():
            remark = f"{lock} was never committed: nothing vouches for it until it is (git add, git commit)"
            yield Doubt(remark, Finding(lock, f"the one in {HEAD}", "never committed", kind=STALE), ("worktree",))
        yield from _config_doubts(checkout, committed)
        yield from _key_doubts(checkout, committed, keys)


def _config_doubts(checkout: Checkout, committed: Committed) -> Iterator[Doubt]:
    where = f"{CONFIG_FILE}: [tool.vpstore]"
    if committed.config is None:
        finding = Finding(where, f"the one in {HEAD}", "never committed", kind=STALE)
        yield Doubt(f"{where} was never committed", finding, ("worktree",))
    for field in fields(checkout.config) if committed.config is not None else ():
        before, now = (getattr(config, field.name) or "none" for config in (committed.config, checkout.config))
        if before != now:
            changed = f"{field.name} was {before}, is {now}"
            remark = f"{where} was changed since the last commit: {changed}; commit it if that is meant"
            finding = Finding(f"{where}: {field.name}", before, now, kind=STALE)
            yield Doubt(remark, finding, ("worktree", "locked") if field.name == "lock" else ("worktree",))


def _key_doubts(checkout: Checkout, committed: Committed, keys: Sequence[TrustedKey]) -> Iterator[Doubt]:
    folder = checkout.config.trusted_keys or (committed.config.trusted_keys if committed.config else None)
    reasons = dict(uncommitted_keys(keys, committed))
    rows = [(name, reason, "its signatures do not count until it is committed") for name, reason in reasons.items()]
    gone = sorted(committed.keys.keys() - {key.name for key in keys})
    rows += [(name, f"{HEAD} has it, and it is not here", "its signatures do not count") for name in gone]
    for name, reason, effect in rows:
        where = f"trusted key {folder}/{name}.pem"
        yield Doubt(
            f"{where}: {reason}; {effect}", Finding(where, f"the one in {HEAD}", reason, kind=STALE), ("worktree",)
        )


def uncommitted_keys(keys: Sequence[TrustedKey], committed: Committed) -> Mapping[str, str]:
    """The names of keys that are not the ones HEAD has under these names, and why; none where HEAD is not known."""
    found = {}
    for key in keys if committed.is_known else ():
        data = committed.keys.get(key.name)
        try:
            if data is None:
                found[key.name] = f"{HEAD} has no such key"
            elif load_trusted_key(Path(f"{key.name}.pem"), data).id != key.id:
                found[key.name] = f"{HEAD} has another key under this name"
        except UsageError:
            found[key.name] = f"{HEAD} has no public key there"
    return found


def check_committed(dossier: Dossier, manifest: Manifest, agreed: Profile, profile: str, committed: Lockfile) -> bool:
    """Whether the lock says of an artifact's object and stage what the commit says; if not, that is told.

    Other bytes than the commit's under the commit's own key make the artifact `relocked`, unless the lock here still
    says so itself: a changed recipe has another key, so what came before was either built on another machine or is what
    a forger hides. Also where the commit has that key under another profile only: the profile is no part of a key.
    """
    ref = manifest.ref
    before = committed.entry(profile, ref)
    is_committed = before == agreed.get(ref)
    if not is_committed:
        said = "names none" if before is None else f"says {before.artifact.short}"
        dossier.remark(f"the lock was changed since the last commit, whose lock {said}; commit it if that is meant")
    if not is_committed or before is None or before.key != manifest.build.key():
        dossier.relocked = _rival(manifest, profile, committed)
    return is_committed


def _rival(manifest: Manifest, profile: str, committed: Lockfile) -> Rival | None:
    """What the commit names instead under the artifact's own key; under several profiles, if none of them names it."""
    entries = {name: entries[manifest.ref] for name, entries in committed.profiles.items() if manifest.ref in entries}
    entries = {name: entry for name, entry in entries.items() if entry.key == manifest.build.key()}
    if profile in entries:
        entries = {profile: entries[profile]}
    if not entries or any(entry.is_kept_by(LockEntry.of(manifest)) for entry in entries.values()):
        return None
    name = min(entries)
    return Rival("" if name == profile else name, entries[name].artifact)


def relocked_fault(dossier: Dossier, rival: Rival, manifest: Manifest, store: Store) -> None:
    """List that an artifact is not what the committed lock says of its key."""
    also = "; the committed lock's artifact is in this store, too" if store.blobs.has(rival.artifact) else ""
    found = f"{manifest.digest}: the committed lock's own key, other bytes{also}"
    profile = f", profile {rival.profile}" if rival.profile else ""
    dossier.fault(LOCK, f"lock in {HEAD}{profile}", expected=rival.artifact, found=found)
