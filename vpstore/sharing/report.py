"""What push and pull did, or would do.

Place in the path: returned by both verbs, printed by the command line.

Example:
    if report.failures: sys.exit(report.exit_code)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vpstore.errors import BadManifest, BlobMissing, DigestMismatch, VpstoreError
from vpstore.schema.digest import Digest

_GRAVITY = (DigestMismatch, BadManifest, BlobMissing)  # which exit code is the command's, if there are several


def gravest(failures: Sequence[VpstoreError]) -> int:
    """The exit code of a command with these failures; 0 if there are none."""
    codes = {error.exit_code for error in failures}
    for kind in _GRAVITY:
        if kind.exit_code in codes:
            return kind.exit_code
    return max((error.exit_code for error in failures), default=0)


class Moved(NamedTuple):
    """One object that went over, or would."""

    name: str  # on the remote
    size_bytes: int | None  # None: not known before it moves
    found: str = ""  # what was wrong with the one that was there, if it was read


class Shared(NamedTuple):
    """One artifact of the lineage."""

    label: str
    artifact: Digest
    is_complete: bool  # all of it is now where it should be
    lacks: tuple[str, ...] = ()  # the ancestors of an artifact that is complete itself of which something is missing


@dataclass
class Report:
    """What one push or pull did."""

    remote: str
    is_dry_run: bool = False
    is_deep: bool = False  # what is there is read, instead of believing its name and size
    artifacts: list[Shared] = field(default_factory=list)  # parents first
    moved: list[Moved] = field(default_factory=list)
    present: int = 0  # objects that were there already
    refused: list[str] = field(default_factory=list)  # what of the remote's word was not believed
    failures: list[VpstoreError] = field(default_factory=list)

    @property
    def moved_bytes(self) -> int:
        """Bytes of the objects that moved; those of unknown size, in a dry run, count as none."""
        return sum(row.size_bytes or 0 for row in self.moved)

    @property
    def exit_code(self) -> int:
        """0, or that of the gravest failure."""
        return gravest(self.failures)

    def to_json(self) -> dict[str, Any]:
        """The document as `push --json` and `pull --json` print it."""
        return {
            "remote": self.remote,
            "dry_run": self.is_dry_run,
            "artifacts": [
                {"ref": row.label, "artifact": row.artifact, "complete": row.is_complete, "lacks": list(row.lacks)}
                for row in self.artifacts
            ],
            "objects_moved": len(self.moved),
            "bytes_moved": self.moved_bytes,
            "objects_present": self.present,
            "objects": [row._asdict() for row in self.moved],
            "refused": self.refused,
        }
