"""A workspace: the checkout, the store that serves it, and who is told about the work.

Place in the path: the first argument of every verb, so that verbs take few others.
Invariants: only `build`, `import`, `pull` and `resolve` with --fetch or --rebuild make a store; every other command
meets NoStore instead.

Example:
    work = Workspace.find(Path.cwd()); work.store.blobs
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from vpstore.checkout import Checkout
from vpstore.errors import VpstoreError
from vpstore.holdings import IDENTITY_FILE, read_identity
from vpstore.narration import Narrator, Silent
from vpstore.runner import LoadedRunner, load_runner
from vpstore.schema.digest import Digest
from vpstore.schema.lockfile import LockEntry
from vpstore.schema.ref import StageRef
from vpstore.storage import atomic
from vpstore.storage.store import NAME, Store, locate

LockStatus = Literal["same", "differs", "absent"]


@dataclass(frozen=True)
class Workspace:
    """What every verb works on."""

    checkout: Checkout
    store: Store
    narrator: Narrator = field(default_factory=Silent)

    @classmethod
    def find(
        cls, start: Path, *, profile: str | None = None, narrator: Narrator | None = None, create: bool = False
    ) -> Workspace:
        """The workspace around `start`.

        Args:    create: make the store, in the checkout or at VPSTORE_ROOT, if there is none.
        Raises:  UsageError: not in a checkout, or no such profile; NoStore.
        """
        checkout = Checkout.find(start, profile=profile)
        if create:
            root = locate(start) or checkout.root / NAME
            with atomic.disk_errors(root, "making the store"):
                store = Store.create(root)
        else:
            store = Store.find(start)
        return cls(checkout, store, narrator if narrator is not None else Silent())

    def lock_status(self, ref: StageRef, artifact: Digest) -> LockStatus:
        """How an artifact stands to what the lock says about `ref`."""
        entry = self.checkout.lock().entry(self.checkout.profile, ref)
        if entry is None:
            return "absent"
        return "same" if entry.artifact == artifact or self._is_alike(entry, artifact) else "differs"

    def _is_alike(self, entry: LockEntry, artifact: Digest) -> bool:
        """Whether another artifact has the key and the content that were agreed: all but its history."""
        try:
            return entry.is_kept_by(LockEntry.of(self.store.manifest(artifact)))
        except VpstoreError:  # then nothing says so
            return False

    def how_to_have(self, ref: StageRef) -> str:
        """What makes an artifact be here that is not: the next step of every error that misses it."""
        try:
            is_agreed = self.checkout.lock().entry(self.checkout.profile, ref) is not None
        except VpstoreError:  # a damaged lock is another error's business
            is_agreed = False
        build = f"vpstore build {ref}, or dvc repro, makes it here"
        if not is_agreed:
            return build
        return f"vpstore pull {ref}, or vpstore resolve {ref} --fetch, has it from a remote; {build}"

    def changing(self) -> AbstractContextManager[None]:
        """Keep `gc` away, as `Store.changing()` does, and say so if it is at work and has to be waited for."""
        return self.store.changing(waiting=lambda: self.narrator.warn("vpstore gc is at work in this store; waiting"))

    def reading(self, artifacts: Collection[Digest]) -> AbstractContextManager[None]:
        """Keep artifacts from being collected while they are read at length.

        By a root, which `gc` heeds; who may not write one lets `gc` wait instead.
        """
        can_say = self.store.roots.is_writable and self.store.locks.are_had
        return self.store.roots.running(artifacts=artifacts) if can_say else self.changing()

    def hold(self, artifacts: Mapping[str, Digest]) -> None:
        """Record in the store that this checkout has artifacts, so that `gc` of any other checkout keeps them.

        Called under `changing()`, before the pointer, view or lock entry is made; `holdings` has the names.
        """
        if self._is_shared and not self._identity_path.exists():
            with self.checkout.opened(self._identity_path.parent) as place:
                atomic.write_once(place / IDENTITY_FILE, os.urandom(16).hex().encode() + b"\n")
        self.store.roots.hold_all(self.checkout.root, artifacts, identity=self.identity)

    def is_held(self, artifacts: Mapping[str, Digest]) -> bool:
        """Whether the store already knows that this checkout has them; writes nothing."""
        return self.store.roots.holds(self.checkout.root, artifacts, identity=self.identity)

    @property
    def identity(self) -> str:
        """What tells this checkout from another one at the same path, in a container or on another host.

        Empty before anything is held; and always if the store lies in the checkout, as it can have no such other then.
        """
        return read_identity(self._identity_path) if self._is_shared else ""

    @property
    def _is_shared(self) -> bool:
        root, store = os.path.realpath(self.checkout.root), os.path.realpath(self.store.root)
        return not store.startswith(root + os.sep) or os.path.ismount(store)

    @property
    def _identity_path(self) -> Path:
        return self.checkout.root / self.checkout.config.weights / IDENTITY_FILE

    @cached_property
    def runner(self) -> LoadedRunner:
        """The project's runner, imported when it is first needed."""
        return load_runner(self.checkout)
