"""What repair found and did, one line an object.

Place in the path: returned by repair, printed by the command line.

Example:
    repaired.add("vpDense@wake-up, model.safetensors", blob_name(digest), found="missing", action="fetched")
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from vpstore.errors import BlobMissing, DigestMismatch, VpstoreError
from vpstore.sharing.report import gravest

# fetched: it was missing; replaced: the damaged one is in quarantine; quarantined: and nothing takes its place; lost:
# nobody has a healthy one.
Action = Literal["fetched", "replaced", "rewritten", "quarantined", "lost"]
MISSING = "missing"


class Mended(NamedTuple):
    """One damaged or missing object."""

    where: str  # which artifact, and which part of it
    name: str  # as on a remote: blobs/…, attestations/…, keys/…
    found: str  # "missing", or what it was instead
    action: Action
    next_step: str = ""


@dataclass
class Repaired:
    """What one repair did, or would do."""

    source: str  # where healthy copies came from; "" if from nowhere
    target: str  # what was mended
    is_dry_run: bool = False
    rows: list[Mended] = field(default_factory=list)
    failures: list[VpstoreError] = field(default_factory=list)

    def add(self, where: str, name: str, *, found: str, action: Action, next_step: str = "") -> None:
        """Report one object."""
        self.rows.append(Mended(where, name, found, action, next_step))

    @property
    def exit_code(self) -> int:
        """0 if all is mended; else that of what is left."""
        lost = [row for row in self.rows if row.action == "lost"]
        if any(row.found != MISSING for row in lost):
            return DigestMismatch.exit_code
        return BlobMissing.exit_code if lost else gravest(self.failures)

    def to_json(self) -> dict[str, Any]:
        """The document as `repair --json` prints it."""
        return {
            "source": self.source or None,
            "target": self.target,
            "dry_run": self.is_dry_run,
            "objects": [row._asdict() for row in self.rows],
        }
