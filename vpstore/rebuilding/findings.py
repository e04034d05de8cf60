"""What was found when an artifact was built again, tensor by tensor and file by file.

Place in the path: `comparing` makes them, `reproducing` turns them into a verdict and an attestation, the command line
prints them.
Invariants: a verdict is identical only if bytes were compared by digest or one by one; what was not compared is counted
nowhere.

Example:
    findings.verdict, findings.proved_bytes
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from vpstore.schema.digest import Digest

Verdict = Literal["identical", "within", "different"]
INTERMEDIATE: Final = "intermediate "  # how the findings about intermediates begin


@dataclass(frozen=True)
class TensorFinding:
    """One tensor, as recorded and as it came out."""

    name: str
    shard: str
    size_bytes: int  # as recorded; 0 if only the rebuilt artifact has it
    verdict: Verdict
    note: str = ""  # what differs, where it is not a matter of figures
    max_abs: float | None = None
    max_rel: float | None = None
    is_recorded: bool = True  # False: only the rebuilt artifact has it

    def to_json(self) -> dict[str, Any]:
        """The finding as `reproduce --json` prints it; infinite figures as text."""
        return {
            "name": self.name, "shard": self.shard, "size_bytes": self.size_bytes, "verdict": self.verdict,
            "note": self.note or None, "max_abs": _figure(self.max_abs), "max_rel": _figure(self.max_rel),
        }  # fmt: skip


@dataclass(frozen=True)
class FileFinding:
    """One file beside the shards, an intermediate, or what of a shard is no tensor."""

    path: str
    verdict: Verdict
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The finding as `reproduce --json` prints it."""
        return {"path": self.path, "verdict": self.verdict, "note": self.note or None}


@dataclass(frozen=True)
class Findings:
    """Everything that was held against the artifact."""

    tensors: tuple[TensorFinding, ...]
    files: tuple[FileFinding, ...]
    tensors_total: int  # of the artifact
    total_bytes: int  # of the artifact's tensors
    rebuilt: Digest | None = None  # the artifact that came out; None if only a part was computed
    not_compared: tuple[str, ...] = ()  # files that a part of the tensors says nothing about

    @property
    def verdict(self) -> Verdict:
        """The worst of all."""
        verdicts = {row.verdict for row in self.tensors} | {row.verdict for row in self.files}
        return "different" if "different" in verdicts else "within" if "within" in verdicts else "identical"

    @property
    def proved_bytes(self) -> int:
        """Bytes of the tensors that came out identical."""
        return sum(row.size_bytes for row in self.tensors if row.verdict == "identical")

    @property
    def share(self) -> float:
        """The share of the artifact's tensor bytes that was proved, from 0 to 1; 1 for an artifact without tensors."""
        return self.proved_bytes / self.total_bytes if self.total_bytes else 1.0

    def count(self, verdict: Verdict) -> int:
        """How many tensors came out so."""
        return sum(row.verdict == verdict for row in self.tensors)

    @property
    def compared(self) -> int:
        """How many of the artifact's tensors were compared."""
        return sum(row.is_recorded for row in self.tensors)

    def names(self, verdict: Verdict) -> tuple[str, ...]:
        """What came out so, as the tests of an attestation are called."""
        tensors = [f"tensor {row.name}" for row in self.tensors if row.verdict == verdict]
        files = [row.path for row in self.files if row.verdict == verdict]
        return (*tensors, *(path if path.startswith(INTERMEDIATE) else f"file {path}" for path in files))

    def summary(self) -> str:
        """What differs, in one line."""
        largest = max((row.max_abs for row in self.tensors if row.max_abs is not None), default=None)
        names = self.names("different")
        size = "" if largest is None else f", largest difference {largest:.6g}"
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return f"{self.count('different')} of {self.tensors_total} tensors{size}: {', '.join(names[:8])}{more}"


def _figure(value: float | None) -> float | str | None:
    return value if value is None or abs(value) != float("inf") else "infinity"
