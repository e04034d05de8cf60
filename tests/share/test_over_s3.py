"""The same commands over the S3 protocol, to a server on loopback."""

from __future__ import annotations

import pytest
from damage_tools import flip
from remote_places import S3Server
from two_checkouts import Pair, artifact_of, configure, recipes_run, store_of, take_lock

from vpstore.storage.remotes.base import blob_name

FOLDER = "models/vpstore/"


def contents(server: S3Server, bucket: str) -> dict[str, bytes]:
    return {name.removeprefix(FOLDER): data for name, data in server.contents(bucket).items()}


def test_push_pull_verify_and_repair(pair: Pair, s3_server: S3Server) -> None:
    bucket = s3_server.bucket()
    for project in (pair.a, pair.b):
        configure(project, f"s3://{bucket}/models\n    endpointurl = {s3_server.endpoint}")
    pair.a.run("push")
    assert contents(s3_server, bucket) == pair.objects()  # what a directory holds
    assert pair.a.json("push")["objects_moved"] == 0
    pair.b.run("pull")
    assert recipes_run(pair.b, "build", "--all") == []
    assert pair.b.json("resolve", "plant")["artifact"] == artifact_of(pair.a, "plant@bloom")

    shard = store_of(pair.a).manifest(artifact_of(pair.a, "plant@bloom")).by_path["model.safetensors"].digest
    key = FOLDER + blob_name(shard)
    whole = contents(s3_server, bucket)[blob_name(shard)]
    s3_server.client.put_object(Bucket=bucket, Key=key, Body=whole[:-1] + b"!")
    faults = pair.a.json("verify", "--remote", code=3)["faults"]
    assert {fault["blob"] for fault in faults} == {shard}
    pair.b.blob(shard).unlink()
    pair.b.run("repair", "plant", code=12)
    pair.a.run("repair", "--to-remote", "shared")
    assert contents(s3_server, bucket) == pair.objects()
    flip(pair.a.blob(shard), 50)
    for project in (pair.a, pair.b):
        project.run("repair", "plant")
        assert project.json("verify", "plant")["ok"]
    assert pair.a.json("verify", "--remote", "--all")["ok"]


@pytest.mark.slow
def test_only_what_changed_moves(pair: Pair, s3_server: S3Server) -> None:
    bucket = s3_server.bucket()
    for project in (pair.a, pair.b):
        configure(project, f"s3://{bucket}/models\n    endpointurl = {s3_server.endpoint}")
    pair.a.run("push")
    pair.b.run("pull")
    plant = pair.b.root / "configs" / "plant.toml"
    plant.write_text(plant.read_text().replace("step = 2", "step = 7"))
    pair.b.run("build", "plant@bloom")
    pair.b.run("lock")
    before = contents(s3_server, bucket)
    pushed = pair.b.json("push")
    new = contents(s3_server, bucket).keys() - before.keys()
    assert {row["name"] for row in pushed["objects"]} == new
    assert 0 < len(new) < 10
    take_lock(pair.b, pair.a)
    assert {row["name"] for row in pair.a.json("pull")["objects"]} == {n for n in new if not n.startswith("keys/")}
    assert recipes_run(pair.a, "build", "plant@bloom") == []


def test_a_bucket_that_is_not_there_is_a_remote_failure(pair: Pair, s3_server: S3Server) -> None:
    configure(pair.a, f"s3://nowhere-{s3_server.bucket()}/models\n    endpointurl = {s3_server.endpoint}")
    said = pair.a.run("push", code=16).stderr
    assert "Traceback" not in said
    assert "shared (s3://nowhere-" in said
