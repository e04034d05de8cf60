"""What to say of a blob that cannot be had: missing, not itself, or not for this user.

Place in the path: beside the blobs, which raise these. What this user may not read is no damage, and neither repair nor
build mends it; so it says whose file it is instead.

Example:
    raise missing(path, digest, what="manifest of vpMoE@smoke")
"""

from __future__ import annotations

from pathlib import Path

from vpstore.errors import BlobMissing, BlobUnreadable, DigestMismatch
from vpstore.schema.digest import Digest
from vpstore.storage import modes


def missing(path: Path, digest: Digest, what: str) -> BlobMissing:
    """No file of that name is there."""
    return BlobMissing(
        "the store does not hold a blob",
        where=what or str(path),
        expected=digest,
        next_step="vpstore pull has it from a remote, vpstore build makes it again; or set VPSTORE_ROOT",
    )


def odd(
    path: Path, digest: Digest, what: str, found: str, *, headline: str = "a blob cannot be read"
) -> DigestMismatch:
    """What lies in a blob's place is not the blob."""
    return DigestMismatch(
        headline,
        where=f"{what}, {path}" if what else str(path),
        expected=digest,
        found=found,
        next_step="vpstore verify --all lists all damage; `vpstore build --force` the object makes it again",
    )


def refused(path: Path, digest: Digest, what: str, error: OSError) -> DigestMismatch:
    """The operating system gives no bytes: this user may not read them, or the disk cannot."""
    if not isinstance(error, PermissionError):
        return odd(path, digest, what, str(error.strerror))
    return BlobUnreadable(
        "this user may not read a blob",
        where=f"{what}, {path}" if what else str(path),
        expected=f"read access to {digest}",
        found=modes.whose(path),
    )
