"""DSSE envelopes: their form, what is signed, and who is found to have signed it."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from signing_tools import HERE, Keys, fixed_statement

from vpstore.errors import BadManifest, DigestMismatch, UsageError, VpstoreError
from vpstore.schema.canonical import canonical_bytes
from vpstore.schema.digest import Digest
from vpstore.schema.dsse import PAYLOAD_TYPE, Envelope, EnvelopeSignature, pae
from vpstore.signatures import SigningKey, TrustedKey, load_signing_key, load_trusted_key, open_envelope
from vpstore.storage.store import Store

GOLDEN = HERE / "golden" / "envelope.dsse"
SIGNING = {"p256", "p384", "p521", "ed25519"}


def pair(keys: Keys, kind: str, name: str = "") -> tuple[SigningKey, TrustedKey]:
    private, public = load_signing_key(keys.private(kind, name)), load_trusted_key(keys.public(kind, name))
    return private, dataclasses.replace(public, name=name or kind)


def test_the_encoding_is_the_specifications_example() -> None:
    text = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert pae("http://example.com/HelloWorld", b"hello world") == text


@pytest.mark.parametrize(
    ("kind", "payload", "expected"),
    [
        ("", b"", b"DSSEv1 0  0 "),
        ("hé", b"\x00 1 ", b"DSSEv1 3 h\xc3\xa9 4 \x00 1 "),  # lengths are of bytes, not letters
        ("a", b"x" * 10, b"DSSEv1 1 a 10 " + b"x" * 10),
    ],
)
def test_lengths_are_in_bytes_and_decimal(kind: str, payload: bytes, expected: bytes) -> None:
    assert pae(kind, payload) == expected


def test_the_specifications_signature_is_what_its_key_gives() -> None:
    """Key and result of the example in the DSSE specification, whose signature is r and s, one after the other."""
    secret = 97358161215184420915383655311931858321456579547487070936769975997791359926199
    private = ec.derive_private_key(secret, ec.SECP256R1())
    key = SigningKey("specification", "ECDSA P-256", private)
    r, s = decode_dss_signature(key.sign(pae("http://example.com/HelloWorld", b"hello world")))
    raw = base64.b64encode(r.to_bytes(32, "big") + s.to_bytes(32, "big")).decode()
    assert raw == "A3JqsQGtVsJ2O2xqrI5IcnXip5GToJ3F+FnZ+O88SjtR6rDAajabZKciJTfUiHqJPcIAriEGAHTVeCUjW2JIZA=="


def test_an_envelope_never_changes() -> None:
    """Made once with the key beside it; every later version must read it, and write the same."""
    key = load_signing_key(HERE / "keys" / "test-only-p256.pem")
    assert key.seal(fixed_statement().encode()).encode() == GOLDEN.read_bytes()
    ed = load_signing_key(HERE / "keys" / "test-only-ed25519.pem")
    both = Envelope(fixed_statement().encode(), (*key.seal(fixed_statement().encode()).signatures,
                                                 *ed.seal(fixed_statement().encode()).signatures))  # fmt: skip
    assert both.encode() == GOLDEN.with_name("two-signatures.dsse").read_bytes()


def test_openssl_finds_the_golden_signature_good(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here")
    envelope = Envelope.decode(GOLDEN.read_bytes(), where="golden")
    private = serialization.load_pem_private_key((HERE / "keys" / "test-only-p256.pem").read_bytes(), None)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "pub.pem").write_bytes(private.public_key().public_bytes(serialization.Encoding.PEM, form))
    (tmp_path / "sig").write_bytes(envelope.signatures[0].sig)
    (tmp_path / "data").write_bytes(envelope.signed)
    command = ["openssl", "dgst", "-sha256", "-verify", "pub.pem", "-signature", "sig", "data"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "Verified OK"


def test_another_implementation_reads_and_verifies_it() -> None:
    dsse = pytest.importorskip("securesystemslib.dsse")
    signer = pytest.importorskip("securesystemslib.signer")
    private = serialization.load_pem_private_key((HERE / "keys" / "test-only-p256.pem").read_bytes(), None)
    theirs = dsse.Envelope.from_dict(json.loads(GOLDEN.read_bytes()))
    assert theirs.pae() == Envelope.decode(GOLDEN.read_bytes(), where="golden").signed
    (keyid,) = theirs.signatures
    key = signer.SSlibKey.from_crypto(private.public_key(), keyid=keyid)
    assert set(theirs.verify([key], 1)) == {keyid}


def test_the_payload_is_an_in_toto_statement() -> None:
    statement = pytest.importorskip("in_toto_attestation.v1.statement")
    format_ = pytest.importorskip("google.protobuf.json_format")
    payload = Envelope.decode(GOLDEN.read_bytes(), where="golden").payload
    parsed = format_.Parse(payload.decode(), statement.Statement([], "", {}).pb)
    statement.Statement.copy_from_pb(parsed).validate()
    assert parsed.predicate_type == "https://slsa.dev/provenance/v1"


@pytest.mark.parametrize("kind", sorted(SIGNING))
def test_signed_and_opened(keys: Keys, kind: str) -> None:
    private, public = pair(keys, kind)
    assert private.id == public.id
    data = private.seal(fixed_statement().encode()).encode()
    assert private.seal(fixed_statement().encode()).encode() == data  # deterministic
    found = open_envelope(data, [public], where="here")
    assert (found.signer, found.signers, found.keyids) == (kind, (kind,), (private.id,))
    assert found.statement.document == fixed_statement().document


def test_the_key_id_is_the_sha256_of_the_public_pem(keys: Keys) -> None:
    done = subprocess.run(["sha256sum", keys.public("p384")], capture_output=True, text=True, check=True)
    assert pair(keys, "p384")[1].id == done.stdout.split()[0]


def test_an_unknown_key_is_nobody_and_no_fault(keys: Keys) -> None:
    private, _ = pair(keys, "p256")
    _, other = pair(keys, "p256", "other")
    data = private.seal(fixed_statement().encode()).encode()
    assert open_envelope(data, [other], where="here").signer is None
    assert open_envelope(data, [], where="here").signers == ()


def test_several_signatures(keys: Keys) -> None:
    pairs = [pair(keys, kind, name) for kind, name in (("p256", "a"), ("ed25519", "b"), ("p521", "c"))]
    payload = fixed_statement().encode()
    envelope = Envelope(payload, tuple(private.seal(payload).signatures[0] for private, _ in pairs))
    trusted = [public for _, public in pairs[:2]]
    found = open_envelope(envelope.encode(), trusted, where="here")
    assert sorted(found.signers) == ["a", "b"]
    assert len(found.keyids) == 3
    assert [row.keyid for row in envelope.signatures] == sorted(row.keyid for row in envelope.signatures)


def tampered(kind: str, good: dict[str, Any], foreign: SigningKey) -> dict[str, Any]:
    payload = base64.b64decode(good["payload"])
    row = good["signatures"][0]
    text = base64.b64encode(payload.replace(b'"device":"cpu"', b'"device":"gpu"')).decode()
    assert text != good["payload"]
    false = base64.b64encode(foreign.sign(pae(PAYLOAD_TYPE, payload))).decode()
    bare = base64.b64encode(foreign.sign(payload)).decode()
    return {
        "payload": {**good, "payload": text},
        "signature of another key": {**good, "signatures": [{**row, "sig": false}]},
        "signature over the payload alone": {**good, "signatures": [{**row, "sig": bare}]},
        "no signature bytes": {**good, "signatures": [{**row, "sig": ""}]},
        "cut signature": {**good, "signatures": [{**row, "sig": base64.b64encode(b"0").decode()}]},
        "type": {**good, "payloadType": "application/vnd.in-toto+jsom"},
        "none": {**good, "signatures": []},
        "twice": {**good, "signatures": [row, row]},
        "extra field": {**good, "note": "x"},
        "extra field of a signature": {**good, "signatures": [{**row, "cert": "x"}]},
        "no key id": {**good, "signatures": [{"sig": row["sig"]}]},
        "url-safe base64": {**good, "payload": good["payload"] + "\n"},
        "payload no statement": {**good, "payload": base64.b64encode(b"{}").decode()},
        "too many": {**good, "signatures": [{"keyid": f"{n:03}", "sig": "AA=="} for n in range(65)]},
    }[kind]


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("payload", DigestMismatch),
        ("signature of another key", DigestMismatch),
        ("signature over the payload alone", DigestMismatch),
        ("cut signature", DigestMismatch),
        ("no signature bytes", BadManifest),
        ("type", BadManifest),
        ("none", BadManifest),
        ("twice", BadManifest),
        ("extra field", BadManifest),
        ("extra field of a signature", BadManifest),
        ("no key id", BadManifest),
        ("url-safe base64", BadManifest),
        ("payload no statement", BadManifest),
        ("too many", BadManifest),
    ],
)
def test_a_changed_envelope_is_refused(keys: Keys, kind: str, error: type[VpstoreError]) -> None:
    private, public = pair(keys, "p256")
    good = private.seal(fixed_statement().encode()).to_json()
    data = canonical_bytes(tampered(kind, good, pair(keys, "p256", "foreign")[0]))
    with pytest.raises(error):
        open_envelope(data, [public], where="here")


def test_an_unknown_signature_beside_a_good_one_changes_nothing(keys: Keys) -> None:
    """Anybody can add one, so it can neither help nor hurt."""
    private, public = pair(keys, "p256")
    good = private.seal(fixed_statement().encode())
    more = dataclasses.replace(good, signatures=(*good.signatures, EnvelopeSignature("f" * 64, b"noise")))
    found = open_envelope(more.encode(), [public], where="here")
    assert found.signer == "p256"
    assert len(found.keyids) == 2


def test_another_key_id_makes_it_nobodys(keys: Keys) -> None:
    private, public = pair(keys, "p256")
    good = private.seal(fixed_statement().encode())
    renamed = dataclasses.replace(good, signatures=(EnvelopeSignature("0" * 64, good.signatures[0].sig),))
    assert open_envelope(renamed.encode(), [public], where="here").signer is None


def test_a_foreign_signature_with_a_trusted_id_is_refused_even_beside_a_good_one(keys: Keys) -> None:
    private, public = pair(keys, "p256", "a")
    _, second = pair(keys, "p256", "b")
    good = private.seal(fixed_statement().encode())
    more = dataclasses.replace(good, signatures=(*good.signatures, EnvelopeSignature(second.id, b"noise")))
    with pytest.raises(DigestMismatch, match="not by the key"):
        open_envelope(more.encode(), [public, second], where="here")


def test_a_layout_that_only_looks_different_is_refused(keys: Keys) -> None:
    document = pair(keys, "p256")[0].seal(fixed_statement().encode()).to_json()
    with pytest.raises(BadManifest, match="canonical"):
        open_envelope(json.dumps(document).encode(), [], where="here")


def unchanged_by_nobody(data: bytes, public: TrustedKey) -> bool:
    """Whether changed bytes are refused, or at least carry nobody's word."""
    try:
        return open_envelope(data, [public], where="here").signer is None
    except VpstoreError:
        return True


def test_no_byte_of_an_envelope_can_change(keys: Keys, store: Store) -> None:
    """Every byte, one bit at a time: the store refuses the file, and the bytes alone are never the signer's word."""
    private, public = pair(keys, "ed25519")
    envelope = private.seal(fixed_statement().encode())
    path = store.attestations.add_envelope(fixed_statement().artifact, envelope)
    good = path.read_bytes()
    assert store.attestations.read(path).document == fixed_statement().document
    path.chmod(0o644)
    for at in range(len(good)):
        changed = bytearray(good)
        changed[at] ^= 1 << (at % 8)
        path.write_bytes(changed)
        with pytest.raises(DigestMismatch, match="does not match its name"):
            store.attestations.read(path)
        assert unchanged_by_nobody(bytes(changed), public), at


@given(at=st.integers(0, 10_000), byte=st.integers(0, 255), how=st.sampled_from(["replace", "insert", "delete"]))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_edit_of_an_envelope_keeps_its_signer(at: int, byte: int, how: str) -> None:
    good = GOLDEN.read_bytes()
    at %= len(good)
    middle = {"replace": bytes([byte]), "insert": bytes([byte, good[at]]), "delete": b""}[how]
    changed = good[:at] + middle + good[at + 1 :]
    key = load_signing_key(HERE / "keys" / "test-only-p256.pem")
    public = TrustedKey("golden", key.id, key.algorithm, key.private.public_key())
    assert changed == good or unchanged_by_nobody(changed, public)


@given(data=st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_noise_is_refused_and_never_a_crash(data: bytes) -> None:
    with pytest.raises(VpstoreError):
        open_envelope(data, [], where="here")


@given(at=st.integers(0, 10_000), byte=st.integers(0, 255), is_cut=st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_damaged_key_is_refused_and_never_a_crash(at: int, byte: int, is_cut: bool) -> None:
    """Whatever the package says about the bytes, a person reads a sentence of ours; a key that still loads is a key."""
    good = (HERE / "keys" / "test-only-p256.pem").read_bytes()
    at %= len(good)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "key.pem"
        path.write_bytes(good[:at] if is_cut else good[:at] + bytes([byte]) + good[at + 1 :])
        with contextlib.suppress(UsageError):
            assert load_signing_key(path).algorithm.startswith("ECDSA P-")
        with pytest.raises(UsageError):
            load_trusted_key(path)


def test_a_curve_hashes_as_model_signing_has_it(keys: Keys) -> None:
    """P-384 with SHA-384: a signature made with another hash is nobody's."""
    private, public = pair(keys, "p384")
    assert public.has_signed(b"x", private.private.sign(b"x", ec.ECDSA(hashes.SHA384())))
    assert not public.has_signed(b"x", private.private.sign(b"x", ec.ECDSA(hashes.SHA256())))


def test_the_store_holds_an_envelope_against_its_name_and_folder(keys: Keys, store: Store) -> None:
    private, _ = pair(keys, "p256")
    artifact = fixed_statement().artifact
    path = store.attestations.add_envelope(artifact, private.seal(fixed_statement().encode()))
    assert path.stem == Digest.of(path.read_bytes()).hex
    assert store.attestations.add_envelope(artifact, private.seal(fixed_statement().encode())) == path
    assert list(store.attestations.envelopes(artifact)) == [path] == list(store.attestations.paths(artifact))
    assert store.attestations.of(artifact) == ()  # a signed copy is not a build's own statement
    elsewhere = store.attestations.root / Digest.of(b"other").hex / path.name
    elsewhere.parent.mkdir()
    shutil.copy(path, elsewhere)
    with pytest.raises(DigestMismatch, match="another artifact"):
        store.attestations.read(elsewhere)
