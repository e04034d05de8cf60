"""Digests: the names of bytes.

Place in the path: below everything that names bytes. A `Digest` is a plain string to JSON and a type of its own to the
reader; past the parser nothing else names a blob.
Invariants: `blake3:` and 64 lowercase hex digits, as `b3sum` prints them; equal bytes, equal digest.

Example:
    >>> Digest.of(b"").short
    'af1349b9f5f9'
"""

from __future__ import annotations

import re
from typing import Final

from blake3 import blake3

from vpstore.errors import BadManifest

PREFIX: Final = "blake3:"
_DIGEST = re.compile(r"blake3:[0-9a-f]{64}")
_HEX = re.compile(r"[0-9a-f]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Digest(str):
    """A BLAKE3 digest; constructing one from anything else is refused."""

    __slots__ = ()

    def __new__(cls, text: str) -> Digest:
        """Check the form.

        Raises:  BadManifest: not `blake3:` and 64 lowercase hex digits.
        """
        return cls.parse(text)

    @classmethod
    def parse(cls, text: object, *, where: str = "") -> Digest:
        """Read a digest from a document.

        Args:    text: what the document has; where: the place, for the error.
        Raises:  BadManifest: not `blake3:` and 64 lowercase hex digits.
        """
        if not isinstance(text, str) or not _DIGEST.fullmatch(text):
            raise BadManifest(
                "not a digest", where=where, expected="blake3: and 64 lowercase hex digits", found=repr(text)[:100]
            )
        return str.__new__(cls, text)

    @classmethod
    def of(cls, data: bytes | memoryview) -> Digest:
        """The digest of bytes in memory."""
        return cls.from_hex(blake3(data).hexdigest())

    @classmethod
    def from_hex(cls, digits: str) -> Digest:
        """The digest whose 64 hex digits are given.

        Raises:  BadManifest: not 64 lowercase hex digits.
        """
        return cls.parse(PREFIX + digits)

    @property
    def hex(self) -> str:
        """The 64 hex digits alone."""
        return self[len(PREFIX) :]

    @property
    def short(self) -> str:
        """The first 12 hex digits: enough for names of views and for tables, never for identity."""
        return self[len(PREFIX) : len(PREFIX) + 12]


def apart(first: Digest, second: Digest) -> tuple[str, str]:
    """Two digests as a person is shown them: as short as ever, but so long that they differ if they do."""
    digits = next((n for n in range(12, 64, 4) if first.hex[:n] != second.hex[:n]), 64)
    return first.hex[:digits], second.hex[:digits]


def is_hex(text: str, digits: int) -> bool:
    """Whether a text is so many lowercase hex digits."""
    return len(text) == digits and _HEX.fullmatch(text) is not None


def parse_sha256(text: object, *, where: str = "") -> str:
    """Read a SHA-256 of a file from outside, 64 lowercase hex digits.

    Raises:  BadManifest: anything else.
    """
    if not isinstance(text, str) or not _SHA256.fullmatch(text):
        raise BadManifest("not a SHA-256", where=where, expected="64 lowercase hex digits", found=repr(text)[:100])
    return text
