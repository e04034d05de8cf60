"""A remote that lies: whatever it claims, the build cache does not serve it and resolve does not lead to it."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from damage_tools import flip
from two_checkouts import Pair, artifact_of, recipes_run, remote_blob, store_of

from vpstore.errors import DigestMismatch
from vpstore.schema.attestation import Statement
from vpstore.schema.canonical import canonical_bytes
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import Manifest
from vpstore.sharing import receiving
from vpstore.sharing.inspection import key_bytes
from vpstore.storage.remotes.base import attestations_prefix, blob_name, key_name
from vpstore.storage.remotes.directory import DirectoryRemote

BLOOM = "plant@bloom"


def put(pair: Pair, name: str, data: bytes) -> None:
    path = pair.remote / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def genuine(pair: Pair, ref: str = BLOOM) -> Manifest:
    return store_of(pair.a).manifest(artifact_of(pair.a, ref))


def forged(pair: Pair) -> Manifest:
    """An artifact that nobody built: the real one's record, and so its key, over other bytes; claimed and attested."""
    manifest = genuine(pair)
    model = manifest.by_path["model.safetensors"]
    data = bytearray(pair.a.blob(model.digest).read_bytes())
    data[-1] ^= 0xFF
    wrong = replace(model, digest=Digest.of(bytes(data)))
    made = replace(manifest, files=tuple(wrong if row == model else row for row in manifest.files))
    put(pair, blob_name(wrong.digest), bytes(data))
    put(pair, blob_name(made.digest), made.encoded)
    facts = store_of(pair.a).attestations.of(manifest.digest)[0].facts
    statement = Statement.of(made, facts).encode()
    put(pair, f"{attestations_prefix(made.digest)}{Digest.of(statement).hex}.json", statement)
    put(pair, key_name(made.build.key(), made.digest), key_bytes(made.build.key(), made.digest))
    return made


def unlock(pair: Pair, ref: str = BLOOM) -> None:
    """Take one entry out of B's lock."""
    path = pair.b.root / "vpstore.lock"
    document = json.loads(path.read_text())
    del document["profiles"]["tiny"][ref]
    path.write_text(json.dumps(document))


def claims_in(pair: Pair, manifest: Manifest) -> list[Path]:
    """What B's store says about an artifact."""
    store = store_of(pair.b)
    key = store.keys.folder(manifest.build.key()) / manifest.digest.hex
    return [path for path in (key, store.attestations.folder(manifest.digest)) if path.exists()]


def is_served(pair: Pair, manifest: Manifest) -> bool:
    """Whether B, building without its lock's word, gets this artifact; and then whether resolve leads there."""
    ran = recipes_run(pair.b, "build", BLOOM)
    resolved = pair.b.json("resolve", BLOOM)["artifact"]
    assert (ran == []) == (resolved == manifest.digest) or ran == []
    return bool(resolved == manifest.digest)


def test_the_forgery_would_be_served_if_it_were_believed(pair: Pair) -> None:
    """The negative control: copied by hand into B's store, the same files do mislead the build cache."""
    unlock(pair)
    pair.b.run("pull")
    made = forged(pair)
    for name in ("blobs", "keys", "attestations"):
        shutil.copytree(pair.remote / name, pair.b.store / name, dirs_exist_ok=True)
    store = store_of(pair.b)
    shutil.rmtree(store.attestations.folder(artifact_of(pair.a, BLOOM)))
    assert is_served(pair, made)


def test_a_forged_claim_beside_the_locked_one_changes_nothing(pair: Pair) -> None:
    made = forged(pair)
    pair.b.run("pull")
    assert claims_in(pair, made) == []
    assert not store_of(pair.b).blobs.has(made.digest)
    assert recipes_run(pair.b, "build", "--all") == []
    assert pair.b.json("resolve", BLOOM)["artifact"] == artifact_of(pair.a, BLOOM)


def test_a_forged_claim_about_what_nobody_locked_is_never_fetched(pair: Pair) -> None:
    unlock(pair)
    made = forged(pair)
    pair.b.run("pull")
    assert not is_served(pair, made)
    assert claims_in(pair, made) == []


def test_the_digits_of_a_forgery_bring_bytes_and_no_claims(pair: Pair) -> None:
    unlock(pair)
    made = forged(pair)
    pair.b.run("pull")
    pair.b.run("pull", f"plant#{made.digest.hex[:12]}", code=15)
    assert not store_of(pair.b).blobs.has(made.digest)
    said = pair.b.run("pull", f"plant#{made.digest.hex}").stderr
    assert "not taken" in said
    assert pair.b.json("resolve", f"plant#{made.digest.hex}")["artifact"] == made.digest
    assert claims_in(pair, made) == []
    assert not is_served(pair, made)


def test_a_key_file_that_names_another_valid_artifact(pair: Pair) -> None:
    bloom, sprout = genuine(pair), genuine(pair, "plant@sprout")
    key = bloom.build.key()
    put(pair, key_name(key, sprout.digest), key_bytes(key, sprout.digest))
    put(pair, key_name(key, bloom.digest), key_bytes(key, sprout.digest))  # its content contradicts its name
    pair.b.run("pull")
    assert store_of(pair.b).keys.artifacts(key) == (bloom.digest,)
    assert recipes_run(pair.b, "build", "--all") == []
    assert pair.b.json("resolve", BLOOM)["artifact"] == bloom.digest


@pytest.mark.parametrize("lie", ["code", "content"])
def test_what_claims_another_code_or_content_than_it_has_does_not_come_in(pair: Pair, lie: str) -> None:
    """Even if the lock names it: whoever locked it was misled."""
    bloom, seed = genuine(pair), genuine(pair, "seed@main")
    if lie == "code":
        evil = b"def make(*given):\n    return 'something else'\n"
        put(pair, blob_name(Digest.of(evil)), evil)
        files = tuple(row._replace(digest=Digest.of(evil)) for row in bloom.build.recipe_files)
        made = replace(bloom, build=replace(bloom.build, recipe_files=files))
    else:
        inputs = tuple(row._replace(artifact=seed.digest) for row in bloom.build.inputs)
        made = replace(bloom, build=replace(bloom.build, inputs=inputs))
    assert made.build.key() == bloom.build.key()
    put(pair, blob_name(made.digest), made.encoded)
    lock = pair.b.root / "vpstore.lock"
    lock.write_text(lock.read_text().replace(bloom.digest, made.digest))
    failures = pair.b.json("pull", BLOOM, code=14)["failures"]
    assert "contradicts what it names" in {row["what"] for row in failures}.pop()
    assert not store_of(pair.b).blobs.has(made.digest)
    assert not pair.b.pointer("plant-bloom").exists()


def test_a_pointer_on_the_remote_is_nobodys(pair: Pair) -> None:
    made = forged(pair)
    pointer = pair.a.pointed("plant-bloom") | {"artifact": made.digest}
    for name in ("refs/plant-bloom.json", "weights/tiny/refs/plant-bloom.json"):
        put(pair, name, json.dumps(pointer).encode())
    pair.b.run("pull")
    assert pair.b.pointed("plant-bloom")["artifact"] == artifact_of(pair.a, BLOOM)


@pytest.mark.parametrize("is_locked", [True, False])
def test_a_forged_pointer_in_the_checkout_fetches_nothing(pair: Pair, is_locked: bool) -> None:
    if not is_locked:
        unlock(pair)
    made = forged(pair)
    pair.b.run("pull", "seed")
    pointer = pair.a.pointed("plant-bloom") | {"artifact": made.digest}
    pair.b.pointer("plant-bloom").write_text(json.dumps(pointer))
    pair.b.run("resolve", BLOOM, code=12)
    assert "nobody who is believed" in pair.b.run("resolve", BLOOM, "--fetch", code=15).stderr
    pair.b.run("repair", BLOOM, "--from", "shared", code=15)
    if is_locked:
        assert "the pointer here says" in pair.b.run("pull", BLOOM).stderr
    else:
        pair.b.run("pull", BLOOM, code=15)
    assert not store_of(pair.b).blobs.has(made.digest)
    assert claims_in(pair, made) == []


def test_a_pointer_to_another_stage_fetches_nothing(pair: Pair) -> None:
    sprout = genuine(pair, "plant@sprout")
    pair.b.run("pull", "seed")
    pointer = pair.a.pointed("plant-bloom") | {"artifact": sprout.digest}
    pair.b.pointer("plant-bloom").write_text(json.dumps(pointer))
    assert "another object or stage" in pair.b.run("resolve", BLOOM, "--fetch", code=14).stderr
    assert not store_of(pair.b).blobs.has(sprout.digest)


def test_a_manifest_with_another_digest_is_refused(pair: Pair) -> None:
    made, bloom = forged(pair), genuine(pair)
    put(pair, blob_name(bloom.digest), made.encoded)
    assert [row["exit_code"] for row in pair.b.json("pull", code=13)["failures"]] == [13]
    assert not store_of(pair.b).blobs.has(bloom.digest)
    pair.b.run("resolve", BLOOM, code=12)
    pair.b.run("resolve", BLOOM, "--fetch", code=13)
    pair.b.run("resolve", "plant@sprout")


def test_a_manifest_that_is_not_canonical_is_refused(pair: Pair) -> None:
    """A lock that somebody edited may name any bytes; they still have to be a manifest."""
    data = json.dumps(json.loads(genuine(pair).encoded), indent=1).encode()
    put(pair, blob_name(Digest.of(data)), data)
    edit_lock(pair, artifact=Digest.of(data))
    pair.b.run("pull", BLOOM, code=14)
    assert not store_of(pair.b).blobs.has(Digest.of(data))


def edit_lock(pair: Pair, **fields: str) -> None:
    path = pair.b.root / "vpstore.lock"
    document = json.loads(path.read_text())
    document["profiles"]["tiny"][BLOOM].update(fields)
    path.write_text(json.dumps(document))


def test_a_lock_entry_that_leads_to_another_stage_is_refused(pair: Pair) -> None:
    edit_lock(pair, artifact=artifact_of(pair.a, "plant@sprout"))
    assert "another object or stage" in pair.b.run("pull", BLOOM, code=14).stderr
    assert not pair.b.pointer("plant-bloom").exists()
    assert not list((pair.b.store / "blobs" / "blake3").glob("*/*"))


@pytest.mark.parametrize("field", ["key", "code", "params"])
def test_a_lock_entry_that_contradicts_its_manifest_is_refused(pair: Pair, field: str) -> None:
    edit_lock(pair, **{field: Digest.of(b"another")})
    assert f"expected  {field} " in pair.b.run("pull", BLOOM, code=14).stderr
    assert not pair.b.pointer("plant-bloom").exists()


def test_an_attestation_about_another_artifact_is_refused(pair: Pair) -> None:
    bloom, sprout = genuine(pair), genuine(pair, "plant@sprout")
    data = store_of(pair.a).attestations.of(sprout.digest)[0].encode()
    name = f"{Digest.of(data).hex}.json"
    put(pair, attestations_prefix(bloom.digest) + name, data)
    assert "about another artifact" in pair.b.run("pull").stderr
    folder = store_of(pair.b).attestations.folder(bloom.digest)
    assert name not in {path.name for path in folder.iterdir()}
    assert recipes_run(pair.b, "build", "--all") == []


def test_an_edited_attestation_is_refused_and_the_cache_misses(pair: Pair) -> None:
    """Its artifact stays locked; without a sound attestation it is no hit, and the recipe says what is true."""
    folder = pair.remote / attestations_prefix(genuine(pair).digest)
    for path in folder.iterdir():
        flip(path, 200)
    assert "does not match its name" in pair.b.run("pull").stderr
    assert claims_in(pair, genuine(pair)) == []
    assert len(recipes_run(pair.b, "build", BLOOM)) == 1
    assert pair.b.json("resolve", BLOOM)["artifact"] == artifact_of(pair.a, BLOOM)


def test_strange_names_among_the_attestations_are_refused(pair: Pair) -> None:
    folder = attestations_prefix(genuine(pair).digest)
    data = next((pair.remote / folder).iterdir()).read_bytes()
    for name in ("readme.txt", f"{Digest.of(data).hex}.json.sh", f"sub/{Digest.of(data).hex}.json"):
        put(pair, folder + name, data)
    assert pair.b.run("pull").stderr.count("not an attestation's name") == 3
    assert len(list(store_of(pair.b).attestations.folder(genuine(pair).digest).iterdir())) == 1


def test_wrong_bytes_never_get_a_name(pair: Pair) -> None:
    digest = genuine(pair).by_path["model.safetensors"].digest
    flip(remote_blob(pair, digest), 70)
    failures = pair.b.json("pull", code=13)["failures"]
    assert len(failures) == 1
    assert "plant@bloom, model.safetensors" in failures[0]["where"]
    assert not store_of(pair.b).blobs.has(digest)
    assert not store_of(pair.b).blobs.has(genuine(pair).digest)
    assert not pair.b.pointer("plant-bloom").exists()
    pair.b.run("resolve", BLOOM, code=12)


def test_an_endless_object_is_stopped(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe file has no size in the manifest, so its length is bounded."""
    monkeypatch.setattr(receiving, "MAX_UNSTATED_BYTES", 1000)
    data = bytes(1001)
    put(pair, blob_name(Digest.of(data)), data)
    put(pair, blob_name(Digest.of(data[:1000])), data[:1000])
    remote = DirectoryRemote(pair.folder / "remote", "shared")
    store = store_of(pair.a)
    with pytest.raises(DigestMismatch, match="larger than it can be"):
        receiving.receive(store, remote, Digest.of(data), size_bytes=None, moved=lambda _: None)
    receiving.receive(store, remote, Digest.of(data[:1000]), size_bytes=None, moved=lambda _: None)
    assert not store.blobs.has(Digest.of(data))


def key_pair(folder: Path, name: str) -> Path:
    """A private key; its public half is beside it."""
    private = folder / f"{name}.pem"
    subprocess.run(
        ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", str(private)],
        check=True,
        capture_output=True,
    )
    private.chmod(0o600)
    (folder / "public").mkdir(exist_ok=True)
    public = folder / "public" / f"{name}.pem"
    subprocess.run(
        ["openssl", "pkey", "-in", str(private), "-pubout", "-out", str(public)], check=True, capture_output=True
    )
    return private


def trust_key(pair: Pair, name: str) -> None:
    keys = pair.b.root / "trusted"
    keys.mkdir()
    shutil.copy(pair.folder / "public" / f"{name}.pem", keys)
    text = (pair.b.root / "pyproject.toml").read_text()
    (pair.b.root / "pyproject.toml").write_text(text + 'trusted_keys = "trusted"\n')


@pytest.mark.parametrize("signer", ["trusted", "stranger"])
def test_a_signature_by_a_trusted_key_is_as_good_as_the_lock(pair: Pair, signer: str) -> None:
    unlock(pair)
    unlock(pair, "reports@plant-bloom")  # which would bring its parent along, without claims
    key_pair(pair.folder, "trusted")
    key_pair(pair.folder, "stranger")
    trust_key(pair, "trusted")
    pair.a.run("attest", BLOOM, "--key", str(pair.folder / f"{signer}.pem"))
    pair.a.run("push")
    made = forged(pair)
    bloom = genuine(pair)
    name = f"plant#{bloom.digest.hex[:10]}"
    pair.b.run("pull")
    if signer == "stranger":
        pair.b.run("pull", name, code=15)
        assert claims_in(pair, bloom) == []
        assert len(recipes_run(pair.b, "build", BLOOM)) == 1
        return
    pair.b.run("pull", name)
    assert len(claims_in(pair, bloom)) == 2
    assert pair.b.json("resolve", name)["artifact"] == bloom.digest
    assert recipes_run(pair.b, "build", BLOOM) == []
    pair.b.run("pull", f"plant#{made.digest.hex[:12]}", code=15)


def test_a_signature_that_was_tampered_with_vouches_for_nothing(pair: Pair) -> None:
    unlock(pair)
    key_pair(pair.folder, "trusted")
    trust_key(pair, "trusted")
    pair.a.run("attest", BLOOM, "--key", str(pair.folder / "trusted.pem"))
    made, bloom = forged(pair), genuine(pair)
    envelope = json.loads(next(store_of(pair.a).attestations.envelopes(bloom.digest)).read_bytes())
    statement = next((pair.remote / attestations_prefix(made.digest)).iterdir()).read_bytes()
    envelope["payload"] = base64.b64encode(statement).decode()
    data = canonical_bytes(envelope)
    put(pair, f"{attestations_prefix(made.digest)}{Digest.of(data).hex}.dsse", data)
    pair.b.run("pull")
    said = pair.b.run("pull", f"plant#{made.digest.hex[:12]}", code=15).stderr
    assert "nobody who is believed" in said
    assert "a signature is not by the key that it names" in pair.b.run("pull", f"plant#{made.digest.hex}").stderr
    assert claims_in(pair, made) == []
    assert not is_served(pair, made)
