"""Faults: what verify and `verify --remote` list.

Place in the path: made by reading verbs, printed by the command line; a list of them is the verbs' whole answer.

Example:
    Fault("vpDense@wake-up: model.safetensors", expected=digest, found="missing", blob=digest)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, order=True)
class Fault:
    """One thing that is not what it should be."""

    where: str
    expected: str = ""
    found: str = ""
    blob: str = ""
    tensor: str = ""
    is_claim: bool = False  # a manifest says of its code or of a parent's content what is not true

    def to_json(self) -> dict[str, Any]:
        """The fault with null for what does not apply."""
        return {
            "where": self.where,
            "expected": self.expected,
            "found": self.found,
            "blob": self.blob or None,
            "tensor": self.tensor or None,
        }
