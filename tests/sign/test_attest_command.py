"""`vpstore attest`, trusted keys, and what show and verify say of signatures."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from damage_tools import flip, truncate
from signing_tools import Keys, envelopes, payload_of, trust, workspace
from small_project import Project

from vpstore.errors import DigestMismatch, UsageError
from vpstore.schema.canonical import canonical_bytes
from vpstore.schema.digest import Digest
from vpstore.schema.dsse import Envelope
from vpstore.signatures import load_signing_key, load_trusted_keys
from vpstore.storage import system
from vpstore.storage.sha256 import sha256_of


def attest(project: Project, key: Path, *more: str, code: int = 0, **variables: str) -> str:
    done = project.run("attest", "plant", "--key", str(key), *more, code=code, **variables)
    return done.stdout + done.stderr


def statements(project: Project) -> list[Path]:
    artifact = project.json("show", "plant")["artifact"].removeprefix("blake3:")
    return sorted((project.store / "attestations" / artifact).glob("*.json"))


def replace(path: Path, data: bytes) -> Path:
    """Other bytes under the name that is right for them."""
    path.unlink()
    target = path.with_name(Digest.of(data).hex + path.suffix)
    target.write_bytes(data)
    return target


@pytest.mark.parametrize("kind", ["p256", "p384", "p521", "ed25519"])
def test_a_signature_is_stored_shown_and_trusted(built: Project, keys: Keys, kind: str) -> None:
    attest(built, keys.private(kind))
    assert "signed    by nobody trusted here" in built.run("show", "plant").stdout
    trust(built, "release", keys.public(kind))
    assert "signed    by release" in built.run("show", "plant").stdout
    (row,) = built.json("show", "plant")["signatures"]
    assert (row["signers"], row["fault"]) == (["release"], None)
    assert built.run("verify", "--all").stdout == "no faults in the store .vpstore\n"
    (path,) = envelopes(built)
    assert path.stat().st_mode & 0o222 == 0


def test_the_signed_statement_is_the_builds_own(built: Project, keys: Keys) -> None:
    attest(built, keys.private("p256"))
    (path,) = envelopes(built)
    (bare,) = statements(built)
    assert base64.b64decode(json.loads(path.read_text())["payload"]) == bare.read_bytes()


def test_signing_again_changes_nothing(built: Project, keys: Keys) -> None:
    first = built.json("attest", "plant", "--key", str(keys.private("p256")))
    before = built.listing()
    again = built.json("attest", "plant", "--key", str(keys.private("p256")))
    assert (first["is_new"], again["is_new"]) == (True, False)
    assert first["envelope"] == again["envelope"]
    assert built.listing() == before
    attest(built, keys.private("ed25519"))
    assert len(envelopes(built)) == 2


def test_a_dry_run_writes_nothing(built: Project, keys: Keys) -> None:
    before, out = built.listing(), built.root.parent / "plant.sig"
    assert "would sign plant@bloom" in attest(built, keys.private("p256"), "-o", str(out), "--dry-run")
    assert built.listing() == before
    assert not out.exists()


def test_the_latest_statement_is_signed_and_no_forged_one(built: Project, keys: Keys) -> None:
    """A later statement that names other parents has the right name, and is still not what the manifest says."""
    (bare,) = statements(built)
    document = json.loads(bare.read_text())
    later: dict[str, Any] = json.loads(json.dumps(document))
    later["predicate"]["runDetails"]["metadata"]["finishedUnix"] += 10
    forged: dict[str, Any] = json.loads(json.dumps(later))
    forged["predicate"]["runDetails"]["metadata"]["finishedUnix"] += 10
    forged["predicate"]["buildDefinition"]["resolvedDependencies"][0]["digest"]["blake3"] = "00" * 32
    for value in (later, forged):
        data = canonical_bytes(value)
        bare.with_name(f"{Digest.of(data).hex}.json").write_bytes(data)
    attest(built, keys.private("p256"))
    (path,) = envelopes(built)
    assert payload_of(json.loads(path.read_text())) == later


def test_without_a_build_statement_what_the_manifest_says_is_signed(built: Project, keys: Keys) -> None:
    (bare,) = statements(built)
    expected = json.loads(bare.read_text())
    bare.unlink()
    assert "knows neither time nor environment" in attest(built, keys.private("p256"))
    (path,) = envelopes(built)
    payload = payload_of(json.loads(path.read_text()))
    assert payload["subject"] == expected["subject"]
    told, known = (document["predicate"]["buildDefinition"] for document in (payload, expected))
    assert told["resolvedDependencies"] == known["resolvedDependencies"]
    assert told["externalParameters"] == known["externalParameters"]
    assert told["internalParameters"]["environment"] == {}
    assert payload["predicate"]["runDetails"]["metadata"]["finishedUnix"] == 0


def test_a_build_outside_git_is_shown_without_a_commit(built: Project) -> None:
    (line,) = [line for line in built.run("show", "plant").stdout.splitlines() if "attested" in line]
    assert line.endswith(", no git")


def test_a_key_that_others_can_read_is_warned_of(built: Project, keys: Keys) -> None:
    key = keys.private("p256")
    assert "warning" not in attest(built, key)
    key.chmod(0o640)
    assert "chmod 600" in attest(built, key)


def test_a_passphrase_comes_from_the_environment(built: Project, keys: Keys) -> None:
    key = keys.private("p256", password=b"open sesame")
    assert "VPSTORE_KEY_PASSWORD" in attest(built, key, code=2)
    wrong = attest(built, key, code=2, VPSTORE_KEY_PASSWORD="wrong")
    assert "another passphrase" in wrong
    assert "give its passphrase in VPSTORE_KEY_PASSWORD" in wrong
    assert "genpkey" not in wrong
    assert envelopes(built) == []
    assert "signed plant@bloom" in attest(built, key, VPSTORE_KEY_PASSWORD="open sesame")
    # One that is not needed does no harm.
    assert "signed plant@bloom" in attest(built, keys.private("ed25519"), VPSTORE_KEY_PASSWORD="open sesame")


def test_what_is_no_key_is_refused_and_nothing_is_written(built: Project, keys: Keys, tmp_path: Path) -> None:
    (tmp_path / "noise.pem").write_bytes(b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    (tmp_path / "empty.pem").write_bytes(b"")
    wrong = {
        tmp_path / "absent.pem": "No such file",
        tmp_path: "Is a directory",
        tmp_path / "noise.pem": "not a private key",
        tmp_path / "empty.pem": "not a private key",
        keys.public("p256"): "not a private key",
        keys.private("rsa"): "a kind of key that does not sign here",
        keys.private("k256"): "secp256k1",
        keys.private("x25519"): "a kind of key that does not sign here",
    }
    before = built.listing()
    for path, what in wrong.items():
        said = attest(built, path, code=2)
        assert what in said
        assert "Traceback" not in said
    assert built.listing() == before


def test_ed25519_makes_no_bundle(built: Project, keys: Keys) -> None:
    out = built.root.parent / "plant.sig"
    said = attest(built, keys.private("ed25519"), "-o", str(out), code=2)
    assert "needs an ECDSA key" in said
    assert not out.exists()
    assert envelopes(built) == []


def test_a_bundle_spoils_nothing(built: Project, keys: Keys, tmp_path: Path) -> None:
    key = keys.private("p256")
    view = Path(built.run("resolve", "plant").stdout.strip())
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(view / "sig")
    places = {
        view / "plant.sig": "outside the views",
        view / "reports" / "plant.sig": "outside the views",
        tmp_path / "link": "outside the views",
        built.pointer("plant-bloom"): "outside the views",
        built.store / "plant.sig": "outside the store",
        key: "another file than the key",
        tmp_path / "notes.txt": "a new file, or an older bundle",
        tmp_path: "a new file, or an older bundle",
        tmp_path / "absent" / "plant.sig": "a folder that is there",
    }
    before, secret = built.listing(), key.read_bytes()
    for path, what in places.items():
        assert what in attest(built, key, "-o", str(path), code=2), path
    assert built.listing() == before
    assert key.read_bytes() == secret
    assert (tmp_path / "notes.txt").read_text() == "mine"
    attest(built, key, "-o", str(tmp_path / "plant.sig"))
    built.run("attest", "seed", "--key", str(key), "-o", str(tmp_path / "plant.sig"))  # an older bundle is replaced
    payload = payload_of(json.loads((tmp_path / "plant.sig").read_text())["dsseEnvelope"])
    assert payload["predicate"]["vpstore"]["object"] == "seed"


def test_damage_is_not_signed(built: Project, keys: Keys) -> None:
    shard = next(row for row in built.json("show", "plant")["manifest"]["files"] if row["path"].endswith("tensors"))
    flip(built.blob(shard["digest"]), -1)
    out = built.root.parent / "plant.sig"
    attest(built, keys.private("p256"), "-o", str(out), code=13)
    assert not out.exists()
    assert envelopes(built) == []


def test_a_sha256_is_never_told_of_other_bytes(built: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if a stamp says that a blob is whole, its bytes are held against its digest as they are read."""
    work = workspace(built, monkeypatch)
    digests = [digest for digest in work.store.blobs.all()]
    wanted = {digest: str(digest) for digest in digests}
    assert len(sha256_of(work.store.blobs, wanted, told=lambda done, total: None)) == len(digests)
    flip(work.store.blobs.path(digests[3]), 0)
    with pytest.raises(DigestMismatch, match="does not match its digest"):
        sha256_of(work.store.blobs, wanted, told=lambda done, total: None)


def forge(path: Path, trusted: Path, foreign: Path) -> Path:
    """An envelope with the right name whose signature claims a key that did not make it."""
    good = Envelope.decode(path.read_bytes(), where="here")
    claimed, own = load_signing_key(trusted).id, load_signing_key(foreign)
    row = good.signatures[0]._replace(keyid=claimed, sig=own.sign(good.signed))
    return replace(path, Envelope(good.payload, (row,)).encode())


def test_a_forged_signature_is_a_fault_and_is_shown_as_one(built: Project, keys: Keys) -> None:
    trust(built, "release", keys.public("p256"))
    attest(built, keys.private("p256"))
    forge(envelopes(built)[0], keys.private("p256"), keys.private("p256", "mallory"))
    assert "signed    FAULTY: a signature is not by the key that it names" in built.run("show", "plant").stdout
    (fault,) = built.json("verify", "plant", code=3)["faults"]
    assert "a signature by release" in fault["expected"]


@pytest.mark.parametrize("how", ["flip", "truncate", "misplace", "rename"])
def test_a_damaged_envelope_is_a_fault_also_without_keys(built: Project, keys: Keys, how: str) -> None:
    attest(built, keys.private("p256"))
    (path,) = envelopes(built)
    if how == "flip":
        flip(path, 100)
    elif how == "truncate":
        truncate(path)
    elif how == "misplace":
        seed = built.json("show", "seed")["artifact"].removeprefix("blake3:")
        shutil.move(path, path.parents[1] / seed / path.name)
    else:
        path.rename(path.with_name("00" * 32 + ".dsse"))
    faults = built.json("verify", "--all", code=3)["faults"]
    assert any(".dsse" in fault["where"] for fault in faults)


def test_a_trusted_key_that_is_none_is_named(built: Project, keys: Keys) -> None:
    attest(built, keys.private("p256"))
    path = trust(built, "release", keys.public("p256"))
    wrong = {
        b"noise": "not a public key",
        keys.private("p384").read_bytes(): "a private key: keep it elsewhere",
        keys.public("rsa").read_bytes(): "a kind of key that does not sign here",
    }
    for data, what in wrong.items():
        path.write_bytes(data)
        for command in ("show", "verify"):
            said = built.run(command, "plant", code=2).stderr
            assert what in said
            assert "release.pem" in said
    path.write_bytes(keys.public("p256").read_bytes())
    trust(built, "again", keys.public("p256"))
    assert "one key under two names" in built.run("show", "plant", code=2).stderr
    shutil.rmtree(path.parent)
    assert "the folder of trusted keys is missing" in built.run("show", "plant", code=2).stderr


def test_trusted_keys_have_their_files_names(built: Project, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_trusted_keys(workspace(built, monkeypatch).checkout) == ()
    for name, kind in (("zoe", "p256"), ("ada", "ed25519")):
        trust(built, name, keys.public(kind))
    (built.root / "configs/trusted-keys/README.md").write_text("who is who")
    found = load_trusted_keys(workspace(built, monkeypatch).checkout)
    assert [(key.name, key.algorithm) for key in found] == [("ada", "Ed25519"), ("zoe", "ECDSA P-256")]


def without_cryptography(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.modules['cryptography'] = None\nfrom vpstore.cli import main\nmain(sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=project.root, env=project.variables(), capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_without_the_package_signing_says_what_to_install_and_reading_goes_on(built: Project, keys: Keys) -> None:
    done = without_cryptography(built, "attest", "plant", "--key", str(keys.private("p256")))
    assert done.returncode == 2
    assert "pip install -e '.[sign]'" in done.stderr
    attest(built, keys.private("p256"))
    trust(built, "release", keys.public("p256"))
    for command in ("show", "verify"):
        done = without_cryptography(built, command, "plant")
        assert done.returncode == 0, done.stderr
        assert "signatures are not verified" in done.stderr


class Failing(system.Disk):
    """A disk that refuses the nth call that would change it."""

    def __init__(self, number: int) -> None:
        self.left = number

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(5, os.strerror(5))

    def write(self, descriptor: int, data: memoryview) -> int:
        self._count()
        return super().write(descriptor, data)

    def fsync(self, descriptor: int) -> None:
        self._count()
        super().fsync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        self._count()
        super().rename(source, target)


def test_a_failing_disk_leaves_no_half_signature(built: Project, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    from vpstore.api import signing as api
    from vpstore.errors import VpstoreError

    work, key, out = workspace(built, monkeypatch), keys.private("p256"), built.root.parent / "plant.sig"
    api.attest("plant", key=key, work=work)  # the view and all else is there
    good = envelopes(built)[0].read_bytes()
    envelopes(built)[0].unlink()
    said: list[str] = []
    for number in range(1, 100):
        monkeypatch.setattr(system, "disk", Failing(number))
        try:
            api.attest("plant", key=key, out=out, work=work)
        except VpstoreError as error:
            said.append(error.what)
        else:
            break
        finally:
            monkeypatch.setattr(system, "disk", system.Disk())
        assert all(path.read_bytes() == good for path in envelopes(built))
        assert not out.exists() or json.loads(out.read_text())["mediaType"]
        assert list((built.store / "tmp").iterdir()) == []
    assert all("Input/output error" in what for what in said)
    assert len(said) > 5  # it did fail several times
    assert [path.read_bytes() for path in envelopes(built)] == [good]
    assert json.loads(out.read_text())["mediaType"]


def test_the_key_never_leaves_its_file(built: Project, keys: Keys) -> None:
    """Neither output nor store contains a line of it, and no error message shows it."""
    key = keys.private("p256")
    secret = [line for line in key.read_text().splitlines() if "-----" not in line]
    said = attest(built, key, "-o", str(built.root.parent / "plant.sig"))
    key.write_text(key.read_text().replace("PRIVATE KEY", "PRIVATE KEYS", 1))
    said += attest(built, key, code=2)
    data = said.encode() + b"".join(built.listing().values()) + (built.root.parent / "plant.sig").read_bytes()
    assert not any(line.encode() in data for line in secret)
    with pytest.raises(UsageError):
        load_signing_key(key)
