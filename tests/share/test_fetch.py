"""resolve --fetch brings one artifact; without it nothing is ever fetched and no remote is asked."""

from __future__ import annotations

import json
import socket

import pytest
from two_checkouts import Pair, artifact_of, configure, named_by_remote, store_of

BLOOM = "plant@bloom"
AWS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_EC2_METADATA_DISABLED": "true"}


def test_it_brings_what_one_ref_needs_and_no_ancestor(pair: Pair) -> None:
    found = pair.b.json("resolve", "plant", "--fetch")
    assert found["artifact"] == artifact_of(pair.a, "plant@bloom")
    store = store_of(pair.b)
    manifest = store.manifest(artifact_of(pair.a, "plant@bloom"))
    present = set(store.blobs.all())
    assert present == {manifest.digest, *manifest.blobs()}
    assert store.keys.artifacts(manifest.build.key()) == (manifest.digest,)
    assert not pair.b.pointer("plant-bloom").exists()
    assert list((pair.b.store / "roots").glob("*.json")), "the checkout is registered, so that its lock is a root"
    pair.b.run("resolve", "plant@sprout", code=12)


def test_what_was_fetched_alone_can_be_pushed_where_its_ancestors_are(pair: Pair) -> None:
    pair.b.run("resolve", "plant", "--fetch")
    whole = pair.objects()
    attestation = next(name for name in whole if name.startswith(f"attestations/{artifact_of(pair.a, BLOOM).hex}"))
    (pair.remote / attestation).unlink()
    assert [row["name"] for row in pair.b.json("push", BLOOM)["objects"]] == [attestation]
    assert pair.objects() == whole
    configure(pair.b, pair.folder / "other")
    failures = pair.b.json("push", BLOOM, code=12)["failures"]
    assert [failure["expected"] for failure in failures] == [artifact_of(pair.a, "plant@sprout")]
    assert named_by_remote(pair.folder / "other" / "vpstore") == []


def test_a_digest_is_fetched_too(pair: Pair) -> None:
    artifact = artifact_of(pair.a, "plant@bloom")
    assert pair.b.json("resolve", f"plant#{artifact.hex[:8]}", "--fetch")["artifact"] == artifact
    pair.b.run("resolve", f"seed#{artifact.hex[:8]}", "--fetch", code=11)
    assert "another object" in pair.b.run("pull", f"seed#{artifact.hex}", code=14).stderr


def test_locked_fetches_nothing_that_it_would_refuse(pair: Pair) -> None:
    pair.b.run("pull", "seed")
    pair.b.pointer("plant-bloom").write_text(json.dumps(pair.a.pointed("plant-bloom")))
    lock = pair.b.root / "vpstore.lock"
    lock.write_text(lock.read_text().replace(artifact_of(pair.a, "plant@bloom"), artifact_of(pair.a, "plant@sprout")))
    pair.b.run("resolve", "plant", "--fetch", "--locked", code=15)
    assert not store_of(pair.b).blobs.has(artifact_of(pair.a, "plant@bloom"))


def test_without_it_no_remote_is_asked(pair: Pair) -> None:
    pair.b.run("pull", "plant@sprout")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        url = f"s3://bucket/models\n    endpointurl = http://127.0.0.1:{listener.getsockname()[1]}"
        configure(pair.b, url)
        pair.b.run("resolve", "plant@sprout", **AWS)
        pair.b.run("resolve", "plant@bloom", code=12, **AWS)
        pair.b.run("build", "plant@bloom", **AWS)
        pair.b.run("verify", code=3, **AWS)
        pair.b.run("ls", **AWS)
        pair.b.run("resolve", "plant@bloom", "--fetch", **AWS)  # all of it is here: nobody is asked
        with pytest.raises(BlockingIOError):
            listener.accept()
    said = pair.b.run("resolve", "reports@plant-bloom", "--fetch", code=16, **AWS).stderr
    assert "shared (s3://bucket/models)" in said


def test_a_remote_without_fetch_is_a_mistake(pair: Pair) -> None:
    pair.a.run("resolve", "plant", "-r", "shared", code=2)


def test_what_the_remote_lacks_is_said(pair: Pair) -> None:
    for path in (pair.remote / "blobs").rglob("*"):
        if path.is_file():
            path.unlink()
    said = pair.b.run("resolve", "plant", "--fetch", code=12).stderr
    assert "plant@bloom" in said
    assert "vpstore push" in said
