"""Prefixes: which artifact `object#digits` means.

Place in the path: where a ref names an artifact by its digest: resolve, audit and its sisters, push, pull and repair.
Invariants: one artifact or an error; what is damaged is never taken for what it says it is.

Example:
    artifact = by_prefix(store, parse_ref("vpDense#143a3690"))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from vpstore.errors import NoSuchRef, VpstoreError
from vpstore.schema.digest import Digest
from vpstore.schema.ref import Ref
from vpstore.storage.store import Store

FULL_DIGITS: Final = 64  # of a digest; who gives them all means exactly this artifact


def by_prefix(store: Store, ref: Ref) -> Digest:
    """The artifact of this store that `object#digits` means.

    Attested artifacts are found by the beginning of their digest, any other by the whole of it. A damaged manifest is
    nobody's namesake; only where all digits are given is it the one that is meant, and whoever reads it says what is
    wrong with it.

    Raises:  NoSuchRef: none, or several.
    """
    prefix = str(ref.prefix)
    exact = Digest.from_hex(prefix) if len(prefix) == FULL_DIGITS else None
    candidates = {*store.attestations.artifacts(prefix), *((exact,) if exact is not None else ())}
    found = []
    for artifact in sorted(candidates):
        try:
            is_meant = store.manifest(artifact).object == ref.object
        except VpstoreError:
            is_meant = artifact == exact and store.blobs.has(artifact)
        if is_meant:
            found.append(artifact)
    return only(ref, found, "this store")


def only(ref: Ref, found: Sequence[Digest], where: str) -> Digest:
    """The one artifact that a digest prefix means.

    Raises:  NoSuchRef: none, or several.
    """
    if len(found) != 1:
        raise NoSuchRef(
            "a digest prefix means more than one artifact" if found else "no artifact has this digest prefix",
            where=f"{ref}, {where}",
            found=", ".join(artifact.short for artifact in found),
            next_step="give more digits" if found else "vpstore ls",
        )
    return found[0]
