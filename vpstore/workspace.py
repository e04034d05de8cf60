"""A workspace: the checkout, the store that serves it, and who is told about the work.

Place in the path: the first argument of every verb, so that verbs take few others.
Invariants: only `build` and `import` make a store; every other command meets NoStore instead.

Example:
    work = Workspace.find(Path.cwd()); work.store.blobs
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from vpstore.checkout import Checkout
from vpstore.narration import Narrator, Silent
from vpstore.runner import Runner, load_runner
from vpstore.schema.digest import Digest
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
        return "same" if entry.artifact == artifact else "differs"

    @cached_property
    def runner(self) -> Runner:
        """The project's runner, imported when it is first needed."""
        return load_runner(self.checkout)
