"""Train or held-out: a stable function of a document's id alone.

Place in the path: text, synth -> **split** -> the data recipe. Adding, removing or reordering documents moves no
other document to the other side.

Invariants: the first 8 bytes of a digest of the id, read as a big-endian number, lie below fraction * 2**64 for
held-out documents; a larger fraction only adds to a smaller one's held-out documents.

Example:
    >>> is_held_out("doc-1", fraction=1.0, digest="sha256")
    True
"""

from __future__ import annotations

import hashlib
from fractions import Fraction
from functools import cache
from typing import Literal

from vpstore.errors import RecipeRefused

SplitDigest = Literal["sha256", "blake2b"]


def is_held_out(identity: str, *, fraction: float, digest: SplitDigest) -> bool:
    """Whether the document named `identity` is held out.

    Args:    fraction: share of held-out documents, 0 to 1, taken as the exact binary value of the float.
             digest: sha256 for prose (`doc_id`), blake2b (64 bytes long) for SYNTH rows (`synth_id`).
    Raises:  RecipeRefused: a fraction outside 0 to 1.
    """
    first = hashlib.new(digest, identity.encode()).digest()[:8]
    return int.from_bytes(first, "big") < _threshold(fraction)


@cache
def _threshold(fraction: float) -> Fraction:
    if not 0 <= fraction <= 1:
        raise RecipeRefused("the held-out fraction is out of range", expected="0 to 1", found=repr(fraction))
    return Fraction(fraction) * 2**64
