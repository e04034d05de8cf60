"""DSSE envelopes: a payload and who signed it, in one canonical document.

Place in the path: `attest` puts a statement into one; whoever reads `attestations/<artifact>/*.dsse` takes it out
again. Who signed is the business of `vpstore.signatures`; here nothing is verified but the form.
Invariants: what is signed is the pre-authentication encoding of payload type and payload, never the payload alone, so
that a signature for one type cannot be shown as one for another; `decode` accepts only what `encode` writes: canonical
JSON, canonical base64, signatures sorted by key id, one of each key.

Example:
    envelope = Envelope(statement.encode(), (EnvelopeSignature(key.id, key.sign(pae(PAYLOAD_TYPE, payload))),))

Source:  DSSE v1.0.2, https://github.com/secure-systems-lab/dsse (protocol.md, envelope.md).
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from vpstore.errors import BadManifest
from vpstore.schema.canonical import canonical_bytes, parse_canonical
from vpstore.schema.fields import Fields

PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
MAX_SIGNATURES: Final = 64  # each costs a verification


class EnvelopeSignature(NamedTuple):
    """One signature, and the id of the key that is said to have made it."""

    keyid: str
    sig: bytes


@dataclass(frozen=True)
class Envelope:
    """An in-toto statement's bytes with their signatures."""

    payload: bytes
    signatures: tuple[EnvelopeSignature, ...]

    def __post_init__(self) -> None:
        """Sort the signatures, so that the same ones give the same bytes."""
        object.__setattr__(self, "signatures", tuple(sorted(self.signatures)))

    @property
    def signed(self) -> bytes:
        """The bytes that each signature is over."""
        return pae(PAYLOAD_TYPE, self.payload)

    def to_json(self) -> dict[str, Any]:
        """The document of the DSSE specification."""
        return {
            "payload": base64_text(self.payload),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"keyid": row.keyid, "sig": base64_text(row.sig)} for row in self.signatures],
        }

    def encode(self) -> bytes:
        """The canonical bytes; their digest names the file in the store."""
        return canonical_bytes(self.to_json(), where="envelope")

    @classmethod
    def decode(cls, data: bytes, *, where: str) -> Envelope:
        """Read an envelope; the signatures are verified by nobody yet.

        Raises:  BadManifest: not canonical, not an envelope of an in-toto statement, no signature, or two by one key.
        """
        fields = Fields(parse_canonical(data, where=where), where=where)
        if (found := fields.text("payloadType")) != PAYLOAD_TYPE:
            raise BadManifest(
                "an envelope of something else", where=f"{where}: payloadType", expected=PAYLOAD_TYPE, found=found[:80]
            )
        payload = _bytes(fields, "payload")
        signatures = fields.each("signatures", lambda row: EnvelopeSignature(row.text("keyid"), _bytes(row, "sig")))
        fields.done()
        if not 1 <= len(signatures) <= MAX_SIGNATURES:
            raise BadManifest(
                "an envelope without signatures, or with too many",
                where=where,
                expected=f"1 to {MAX_SIGNATURES}",
                found=str(len(signatures)),
            )
        keyids = [row.keyid for row in signatures]
        if keyids != sorted(set(keyids)):
            raise BadManifest("the signatures of an envelope are not sorted by key id, one of each", where=where)
        return cls(payload, signatures)


def pae(payload_type: str, payload: bytes) -> bytes:
    """The pre-authentication encoding, version 1: lengths in bytes, in decimal, before what they measure."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def base64_text(data: bytes) -> str:
    """Standard base64 with padding, as envelopes and bundles write bytes."""
    return base64.b64encode(data).decode("ascii")


def _bytes(fields: Fields, name: str) -> bytes:
    text = fields.text(name)
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    # The unused bits of the last character may differ between texts that decode alike: one value, one text.
    if not data or base64_text(data) != text:
        raise BadManifest("not canonical base64", where=f"{fields.where}: {name}", found=repr(text)[:60])
    return data
