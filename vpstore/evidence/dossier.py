"""Dossiers: what was found about each artifact of a chain while it was audited.

Place in the path: every module of evidence/ writes into them; the verb audit makes verdicts of them.
Invariants: a fault belongs to one artifact; equal faults count once; a remark is never a fault.

Example:
    dossier.fault("input", "input parent", expected="vpDense@expand", found="vpDense@wake-up")
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from vpstore.schema.digest import Digest
from vpstore.schema.manifest import Manifest

# What the lock says about an artifact. "bytes": another one under the same key; "inputs": the lock's code, params and
# all else but other parents, which differ from the lock's themselves; "record": another build altogether.
Standing = Literal["same", "absent", "bytes", "inputs", "record"]
# Who says that it is what it seems, the first that is so; "claimed": whoever wrote the store, and nobody else.
Vouched = Literal["locked", "signed", "reproduced", "claimed"]
# Faults of these kinds say that something is not as agreed or as it is now; nothing contradicts itself.
LOCK, STALE, MISSING = "lock", "stale", "missing"
CLAIM = "claim"  # a manifest says of its code or of a parent's content what is not true


@dataclass(frozen=True, order=True)
class Finding:
    """One thing that is not what it should be."""

    where: str
    expected: str = ""
    found: str = ""
    blob: str = ""
    tensor: str = ""
    kind: str = ""
    artifact: str = ""  # whose dossier it stands in

    def to_json(self) -> dict[str, Any]:
        """The finding with null for what does not apply."""
        return {
            "where": self.where,
            "expected": self.expected,
            "found": self.found,
            "blob": self.blob or None,
            "tensor": self.tensor or None,
            "kind": self.kind,
            "artifact": self.artifact or None,
        }


class Rival(NamedTuple):
    """Another artifact under the key of the one that is audited."""

    profile: str  # of the committed lock; "": the one that is audited
    artifact: Digest


@dataclass
class Dossier:
    """All about one artifact."""

    artifact: Digest
    label: str  # object@stage, or the digest's beginning where the manifest is not known
    manifest: Manifest | None
    faults: set[Finding] = field(default_factory=set)
    remarks: set[str] = field(default_factory=set)
    stale: tuple[str, ...] = ()  # what changed in the working tree since it was built, in words
    named: str = ""  # by the lock, or by the person who asked: what it is called where the manifest is not known
    standing: Standing = "absent"
    relocked: Rival | None = None  # what the committed lock names under the same key, where the lock here does not
    vouched: Vouched = "claimed"
    signers: tuple[str, ...] = ()  # trusted keys
    uncounted: tuple[str, ...] = ()  # keys here that signed and are not the committed ones

    def fault(self, kind: str, what: str, *, expected: str, found: str, blob: str = "") -> None:
        """List a fault."""
        self.faults.add(Finding(f"{self.label}: {what}", expected, found, blob, "", kind, self.artifact))

    def damaged_tensor(self, path: str, tensor: str, *, blob: str, found: str) -> None:
        """List a shard whose bytes are not its digest's, and which tensor is hit."""
        self.faults.add(Finding(f"{self.label}: {path}", blob, found, blob, tensor, "blob", self.artifact))

    def remark(self, text: str) -> None:
        """Say something that is worth knowing."""
        self.remarks.add(f"{self.label}: {text}")
