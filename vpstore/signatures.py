"""Signatures: private keys that sign, trusted public keys, and whose signature an envelope carries.

Place in the path: `attest` signs with it; `show`, `verify`, `audit` and whoever believes a remote ask it who signed.
The only module that knows the `cryptography` package, which is loaded when a key is.
Invariants: a key's id is the SHA-256, in hex, of its public half as PEM SubjectPublicKeyInfo (the bytes that `openssl
pkey -pubout` writes), which is also the hint in an OpenSSF Model Signing bundle; signing is deterministic, so that
signing the same statement twice gives one envelope; a signature that claims a trusted key and is not its own is an
error, one by an unknown key is nobody's.

Example:
    keys = load_trusted_keys(checkout)
    signed = open_envelope(path.read_bytes(), keys, where=str(path)); signed.signer
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from vpstore.checkout import Checkout
from vpstore.errors import DigestMismatch, UsageError, VpstoreError
from vpstore.narration import Narrator
from vpstore.schema.attestation import Statement
from vpstore.schema.digest import Digest
from vpstore.schema.dsse import PAYLOAD_TYPE, Envelope, EnvelopeSignature, pae
from vpstore.storage.attestations import Attestations

PASSWORD_VARIABLE: Final = "VPSTORE_KEY_PASSWORD"
_SUFFIX: Final = ".pem"
# Curve -> the hash that goes with it, as the OpenSSF verifier has it.
_CURVES: Final = {"secp256r1": ("P-256", "SHA256"), "secp384r1": ("P-384", "SHA384"), "secp521r1": ("P-521", "SHA512")}
_KINDS: Final = "ECDSA on P-256, P-384 or P-521, or Ed25519"
_MAKE_ONE: Final = "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out KEY.pem makes one"


@dataclass(frozen=True)
class TrustedKey:
    """A public key that the project trusts; its name is its file's, without `.pem`."""

    name: str
    id: str  # 64 lowercase hex digits
    algorithm: str  # "ECDSA P-256", "Ed25519"
    public: Any = field(repr=False)

    def has_signed(self, data: bytes, sig: bytes) -> bool:
        """Whether a signature over these bytes was made with this key's private half."""
        from cryptography.exceptions import InvalidSignature

        try:
            if self.algorithm == "Ed25519":
                self.public.verify(sig, data)
            else:
                self.public.verify(sig, data, _ecdsa(self.public))
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True)
class SigningKey:
    """A private key, open for signing."""

    id: str
    algorithm: str
    private: Any = field(repr=False)

    @property
    def is_ecdsa(self) -> bool:
        """Whether a Model Signing bundle can be made with it."""
        return self.algorithm.startswith("ECDSA")

    def sign(self, data: bytes) -> bytes:
        """The signature over these bytes: DER for ECDSA, 64 bytes for Ed25519; the same bytes, the same signature."""
        from cryptography.exceptions import UnsupportedAlgorithm

        if not self.is_ecdsa:
            return bytes(self.private.sign(data))
        try:
            return bytes(self.private.sign(data, _ecdsa(self.private, is_deterministic=True)))
        except UnsupportedAlgorithm:  # an OpenSSL before 3.2: a random nonce is as valid, only never the same twice
            return bytes(self.private.sign(data, _ecdsa(self.private)))

    def seal(self, payload: bytes) -> Envelope:
        """An envelope around a statement's bytes, signed with this key."""
        return Envelope(payload, (EnvelopeSignature(self.id, self.sign(pae(PAYLOAD_TYPE, payload))),))


@dataclass(frozen=True)
class SignedStatement:
    """What an envelope says, and whose signatures on it are valid."""

    statement: Statement
    signers: tuple[str, ...]  # names of trusted keys, in the order of their ids
    keyids: tuple[str, ...]  # of all signatures, also of those by unknown keys

    @property
    def signer(self) -> str | None:
        """The trusted key that signed it; None if none did."""
        return self.signers[0] if self.signers else None


def load_trusted_keys(checkout: Checkout) -> tuple[TrustedKey, ...]:
    """The public keys in the folder that `[tool.vpstore] trusted_keys` names; none configured, none trusted.

    Returns: in the order of names.
    Raises:  UsageError: no such folder, a file that is no public key of a known kind, one key under two names, or no
             `cryptography` package although there are keys.
    """
    if checkout.config.trusted_keys is None:
        return ()
    folder = checkout.root / checkout.config.trusted_keys
    if not folder.is_dir():
        raise UsageError(
            "the folder of trusted keys is missing",
            where=str(folder),
            expected="a folder of public keys (*.pem), as [tool.vpstore] trusted_keys says",
            next_step="make the folder, or take trusted_keys out of pyproject.toml",
        )
    keys: dict[str, TrustedKey] = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix == _SUFFIX):
        key = load_trusted_key(path)
        if (same := keys.get(key.id)) is not None:
            raise UsageError("one key under two names", where=str(path), found=same.name, next_step="remove one")
        keys[key.id] = key
    return tuple(keys.values())


def load_usable_keys(checkout: Checkout, narrator: Narrator) -> tuple[TrustedKey, ...]:
    """As `load_trusted_keys`, for commands that are of use without: a missing package is a warning."""
    if checkout.config.trusted_keys is not None and find_spec("cryptography") is None:
        narrator.warn("signatures are not verified: cryptography is not installed; pip install -e '.[sign]'")
        return ()
    return load_trusted_keys(checkout)


def load_trusted_key(path: Path, data: bytes | None = None) -> TrustedKey:
    """One public key, from its file, or from what git has of that file.

    Raises:  UsageError: unreadable, not a public key as PEM, or of an unknown kind.
    """
    serialization = _serialization()
    data = _read(path, "a trusted key") if data is None else data
    try:
        if b"PRIVATE KEY" in data:
            raise ValueError("a private key: keep it elsewhere, and put its public half here")
        public = serialization.load_pem_public_key(data)
    except _refusals() as error:
        raise UsageError(
            "not a public key",
            where=str(path),
            expected=f"PEM of {_KINDS}",
            found=str(error)[:120],
            next_step="openssl pkey -in PRIVATE.pem -pubout -out NAME.pem",
        ) from error
    return TrustedKey(path.stem, algorithm=_algorithm(public, path), id=key_id(public), public=public)


def load_signing_key(path: Path) -> SigningKey:
    """A private key; an encrypted one is opened with the passphrase in VPSTORE_KEY_PASSWORD.

    Raises:  UsageError: missing, not a private key as PEM, of an unknown kind, or a missing or wrong passphrase.
    """
    serialization = _serialization()
    data = _read(path, "the key to sign with")
    password = os.environ.get(PASSWORD_VARIABLE)
    is_encrypted = b"ENCRYPTED" in data
    remedy = f"give its passphrase in {PASSWORD_VARIABLE}" if is_encrypted else _MAKE_ONE
    if is_encrypted and not password:
        raise UsageError("a private key is encrypted", where=str(path), next_step=remedy)
    try:
        private = serialization.load_pem_private_key(data, os.fsencode(password or "") if is_encrypted else None)
        public = private.public_key()
    except _refusals() as error:
        raise UsageError(
            "not a private key, or another passphrase" if is_encrypted else "not a private key",
            where=str(path),
            expected=f"PEM of {_KINDS}",
            found=str(error)[:120],
            next_step=remedy,
        ) from error
    return SigningKey(algorithm=_algorithm(public, path), id=key_id(public), private=private)


def key_id(public: Any) -> str:
    """SHA-256, in hex, of a public key as PEM SubjectPublicKeyInfo, laid out as every tool lays it out."""
    form = _serialization()
    return hashlib.sha256(public.public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def open_envelope(data: bytes, keys: Sequence[TrustedKey], *, where: str) -> SignedStatement:
    """Take the statement out of an envelope, and see whose signatures are on it.

    Raises:  BadManifest: not an envelope of a build statement; DigestMismatch: a signature claims a trusted key and is
             not that key's signature of this statement.
    """
    envelope = Envelope.decode(data, where=where)
    statement = Statement.decode(envelope.payload, where=f"{where}: payload")
    keyids = tuple(row.keyid for row in envelope.signatures)
    return SignedStatement(statement, signers_of(envelope, keys, where=where), keyids)


@dataclass(frozen=True)
class Signed:
    """One envelope of an artifact: by whom, or what is wrong with it."""

    path: Path
    signers: tuple[str, ...] = ()
    keyids: tuple[str, ...] = ()
    fault: VpstoreError | None = None


def examine(attestations: Attestations, artifact: Digest, keys: Sequence[TrustedKey]) -> Iterator[Signed]:
    """Every envelope about an artifact, in the order of names: its form, its subject, and whose signatures it has."""
    for path in attestations.envelopes(artifact):
        try:
            attestations.read(path)
            found = open_envelope(path.read_bytes(), keys, where=str(path))
        except VpstoreError as error:
            yield Signed(path, fault=error)
        else:
            yield Signed(path, found.signers, found.keyids)


def signers_of(envelope: Envelope, keys: Sequence[TrustedKey], *, where: str) -> tuple[str, ...]:
    """The names of the trusted keys that signed.

    Raises:  DigestMismatch: a signature claims a trusted key and is not its own.
    """
    known = {key.id: key for key in keys}
    names = []
    for row in envelope.signatures:
        key = known.get(row.keyid)
        if key is None:
            continue
        if not key.has_signed(envelope.signed, row.sig):
            raise DigestMismatch(
                "a signature is not by the key that it names",
                where=where,
                expected=f"a signature by {key.name} ({key.id[:12]}) of this statement",
                found="another; `vpstore repair` sets it aside",  # also in lists of faults, which have no next step
                next_step="do not believe this attestation: it was changed after it was signed, or is a forgery",
            )
        names.append(key.name)
    return tuple(names)


def _serialization() -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError as error:
        raise UsageError(
            "signatures need a package that is not installed", found=str(error), next_step="pip install -e '.[sign]'"
        ) from error
    return serialization


def _refusals() -> tuple[type[Exception], ...]:
    """What the package raises about a file that is not the key it was said to be."""
    from cryptography.exceptions import UnsupportedAlgorithm

    return ValueError, TypeError, UnsupportedAlgorithm


def _algorithm(public: Any, path: Path) -> str:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    if isinstance(public, ed25519.Ed25519PublicKey):
        return "Ed25519"
    if isinstance(public, ec.EllipticCurvePublicKey) and public.curve.name in _CURVES:
        return f"ECDSA {_CURVES[public.curve.name][0]}"
    curve = f" on {public.curve.name}" if isinstance(public, ec.EllipticCurvePublicKey) else ""
    raise UsageError(
        "a kind of key that does not sign here",
        where=str(path),
        expected=_KINDS,
        found=type(public).__name__.strip("_") + curve,
        next_step=_MAKE_ONE,
    )


def _ecdsa(key: Any, *, is_deterministic: bool = False) -> Any:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    algorithm = getattr(hashes, _CURVES[key.curve.name][1])()
    return ec.ECDSA(algorithm, deterministic_signing=is_deterministic)


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{what} cannot be read", where=str(path), found=str(error.strerror), next_step="name a readable PEM file"
        ) from error
