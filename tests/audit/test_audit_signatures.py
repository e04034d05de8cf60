"""audit over signed artifacts: named signers, wrong signatures, and what a signature shows that nothing else does."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from forger import Forger
from orchard import commit
from small_project import Project

from vpstore.schema.canonical import canonical_bytes
from vpstore.schema.digest import Digest

pytest.importorskip("cryptography")


def trust(project: Project, name: str) -> Path:
    """A new key whose public half the project trusts under `name`.

    Returns: the private half.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    private = project.cache / f"{name}.key.pem"
    private.parent.mkdir(parents=True, exist_ok=True)
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    private.chmod(0o600)
    public = project.root / "keys" / f"{name}.pem"
    public.parent.mkdir(exist_ok=True)
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    pyproject = project.root / "pyproject.toml"
    if "trusted_keys" not in pyproject.read_text():
        pyproject.write_text(pyproject.read_text() + 'trusted_keys = "keys"\n')
    return private


def envelope(forger: Forger, slug: str = "graft-main") -> Path:
    (path,) = forger.store.attestations.envelopes(forger.artifact(slug))
    return path


def test_signers_are_named_and_the_unsigned_are_counted(orchard: Project) -> None:
    key = trust(orchard, "release")
    commit(orchard)
    assert "5 of 5 artifacts carry no signature of a trusted key" in orchard.json("audit", "graft")["remarks"]
    orchard.run("attest", "graft", "--key", str(key))
    document = orchard.json("audit", "graft")
    assert document["ok"]
    assert document["remarks"] == ["4 of 5 artifacts carry no signature of a trusted key"]
    assert [row["signed_by"] for row in document["chain"]][-1] == ["release"]
    assert "sound  signed by release" in orchard.run("audit", "graft").stdout


def test_a_signature_by_nobody_who_is_trusted_counts_for_nothing(orchard: Project) -> None:
    key = trust(orchard, "release")
    orchard.run("attest", "graft", "--key", str(key))
    (orchard.root / "keys" / "release.pem").unlink()
    trust(orchard, "other")
    document = orchard.json("audit", "graft")
    assert document["ok"]
    assert document["chain"][-1]["signed_by"] == []


@pytest.mark.parametrize("part", ["payload", "signature", "bytes"])
def test_a_signature_that_is_not_the_keys_own_is_a_fault(orchard: Project, forger: Forger, part: str) -> None:
    """The statement changed under its signature, or the signature itself; renamed so that the file's name is right."""
    key = trust(orchard, "release")
    orchard.run("attest", "graft", "--key", str(key))
    path = envelope(forger)
    path.chmod(0o644)
    document = json.loads(path.read_text())
    if part == "payload":
        payload = base64.b64decode(document["payload"])
        payload = payload.replace(b'"device":"cpu"', b'"device":"gpu"')
        document["payload"] = base64.b64encode(payload).decode()
    elif part == "signature":
        sig = bytearray(base64.b64decode(document["signatures"][0]["sig"]))
        sig[-1] ^= 1
        document["signatures"][0]["sig"] = base64.b64encode(bytes(sig)).decode()
    data = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    path.write_bytes(data if part != "bytes" else path.read_bytes()[:-2])
    if part != "bytes":
        path = path.rename(path.with_name(f"{Digest.of(data).hex}.dsse"))
    found = orchard.json("audit", "graft", code=3)["faults"]
    expected = {"attestation", "signature"} if part == "bytes" else {"signature"}
    assert {fault["kind"] for fault in found} == expected


def test_an_envelope_about_another_artifact_is_a_fault(orchard: Project, forger: Forger) -> None:
    """A true signature, moved to the folder of another artifact, vouches for nothing there."""
    key = trust(orchard, "release")
    orchard.run("attest", "graft", "--key", str(key))
    path = envelope(forger)
    folder = forger.store.attestations.folder(forger.artifact("plant-bloom"))
    (folder / path.name).write_bytes(path.read_bytes())
    document = orchard.json("audit", "graft", code=3)
    assert {fault["kind"] for fault in document["faults"]} == {"attestation"}
    signed = {f"{row['object']}@{row['stage']}": row["signed_by"] for row in document["chain"]}
    assert signed["plant@bloom"] == []
    assert signed["graft@main"] == ["release"]


def test_a_forgery_that_also_changes_the_lock_loses_its_signature(orchard: Project, forger: Forger) -> None:
    """Whoever may write store, checkout and lock, but has no trusted key, cannot say who built it."""
    key = trust(orchard, "release")
    for ref in ("seed", "plant@sprout", "plant@bloom", "leaves", "graft"):
        orchard.run("attest", ref, "--key", str(key))
    commit(orchard)
    assert orchard.json("audit", "graft", "--signed")["remarks"] == []
    forger.accept(forger.replace_artifact("graft-main", forger.with_tensor))
    commit(orchard)
    document = orchard.json("audit", "graft")
    assert document["remarks"] == ["1 of 5 artifacts carry no signature of a trusted key"]
    assert document["chain"][-1]["signed_by"] == []
    found = orchard.json("audit", "graft", "--signed", code=3)["faults"]
    assert [(fault["kind"], fault["where"]) for fault in found] == [("signature", "graft@main: signatures")]


def test_repair_sets_a_false_signature_aside(orchard: Project, forger: Forger) -> None:
    """One byte of a trusted signature changed, under its new digest: no copy of it can ever be right."""
    orchard.run("attest", "graft", "--key", str(trust(orchard, "release")))
    true = envelope(forger)
    document = json.loads(true.read_bytes())
    sig = bytearray(base64.b64decode(document["signatures"][0]["sig"]))
    sig[-1] ^= 1
    document["signatures"][0]["sig"] = base64.b64encode(sig).decode()
    data = canonical_bytes(document)
    false = true.with_name(f"{Digest.of(data).hex}.dsse")
    false.write_bytes(data)
    for command in ("audit", "verify"):
        (fault,) = orchard.json(command, "graft", code=3)["faults"]
        assert "vpstore repair" in fault["found"]
    for options in (["--dry-run"], []):
        assert false.exists()
        rows = orchard.json("repair", "graft", *options)["objects"]
        assert [(row["name"].rpartition("/")[2], row["action"]) for row in rows] == [(false.name, "quarantined")]
    assert [path.read_bytes() for path in (orchard.store / "quarantine").iterdir()] == [data]
    assert true.exists()
    assert orchard.json("audit", "graft")["ok"]
    assert orchard.json("verify", "graft")["ok"]
