"""repair and verify --remote: everything damaged is found, had from elsewhere, and the damaged copy kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from damage_tools import flip, truncate
from two_checkouts import Pair, artifact_of, named_by_remote, objects, remote_blob, store_of

from vpstore.schema.digest import Digest
from vpstore.storage.remotes.base import blob_name

Damage = Callable[[Path], None]


def flipped(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


def gone(path: Path) -> None:
    path.unlink()


def emptied(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(b"")


DAMAGES: list[Damage] = [flipped, truncate, emptied, gone]


def blobs_of(pair: Pair, ref: str) -> dict[str, Digest]:
    """Every kind of blob of an artifact."""
    manifest = store_of(pair.a).manifest(artifact_of(pair.a, ref))
    shard = manifest.by_path["model.safetensors"]
    assert shard.tensors is not None
    return {
        "manifest": manifest.digest,
        "shard": shard.digest,
        "table": shard.tensors,
        "intermediate": manifest.intermediates[0].digest,
        "recipe": next(row.digest for row in manifest.build.recipe_files if row.path == "small/grow.py"),
        "report": manifest.by_path["reports/metrics.json"].digest,
    }


@pytest.mark.parametrize(("damage", "origin"), [*((damage, "remote") for damage in DAMAGES), (flipped, "store")])
def test_every_kind_of_blob_is_mended_and_the_damaged_one_kept(pair: Pair, damage: Damage, origin: str) -> None:
    source = ["--from", "shared"]
    if origin == "store":
        pair.b.run("pull")
        source = ["--from-store", str(pair.b.root)]
    before = {path: data for path, data in pair.a.listing().items() if path.startswith(".vpstore/blobs")}
    wrong = {}
    for digest in blobs_of(pair, "plant@bloom").values():
        damage(pair.a.blob(digest))
        wrong[digest] = pair.a.blob(digest).read_bytes() if pair.a.blob(digest).exists() else None
    pair.a.run("resolve", "plant", code=12 if damage is gone else 13)
    assert pair.a.json("verify", code=3)["faults"]
    planned = pair.a.json("repair", *source, "--dry-run")["objects"]
    assert [pair.a.blob(d).read_bytes() if pair.a.blob(d).exists() else None for d in wrong] == [*wrong.values()]
    done = pair.a.json("repair", *source)["objects"]
    assert planned == done
    word = "fetched" if damage is gone else "replaced"
    assert {(row["name"], row["action"]) for row in done} == {(blob_name(digest), word) for digest in wrong}
    assert {path: data for path, data in pair.a.listing().items() if path.startswith(".vpstore/blobs")} == before
    kept = {path.name[:64]: path.read_bytes() for path in (pair.a.store / "quarantine").iterdir()}
    assert kept == {digest.hex: data for digest, data in wrong.items() if data is not None}
    assert pair.a.json("verify", "--all")["ok"]
    assert pair.a.json("repair", *source)["objects"] == []


def test_what_nobody_has_is_said_and_nothing_is_lost(pair: Pair) -> None:
    digest = blobs_of(pair, "plant@bloom")["shard"]
    flip(pair.a.blob(digest), 60)
    flip(remote_blob(pair, digest), 61)
    damaged = pair.a.blob(digest).read_bytes()
    done = pair.a.json("repair", "plant", code=13)["objects"]
    assert [(row["name"], row["action"]) for row in done] == [(blob_name(digest), "lost")]
    assert "--rebuild" in done[0]["next_step"]
    assert "--force" in done[0]["next_step"]
    assert pair.a.blob(digest).read_bytes() == damaged
    remote_blob(pair, digest).unlink()
    pair.a.json("repair", "plant", code=13)
    pair.a.blob(digest).unlink()
    pair.a.json("repair", "plant", code=12)


def test_without_a_remote_and_without_a_source_damage_is_said(pair: Pair) -> None:
    (pair.a.root / ".dvc" / "config").unlink()
    digest = blobs_of(pair, "plant@bloom")["shard"]
    flip(pair.a.blob(digest), 60)
    done = pair.a.run("repair", code=13)
    assert "lost" in done.stdout
    assert "no remote to repair from" in done.stderr


def test_attestations_and_keys_are_mended(pair: Pair) -> None:
    store = store_of(pair.a)
    bloom = store.manifest(artifact_of(pair.a, "plant@bloom"))
    sprout = store.manifest(artifact_of(pair.a, "plant@sprout"))
    attestation = next(store.attestations.paths(bloom.digest))
    lost = next(store.attestations.paths(sprout.digest))
    key, gone_key = (store.keys.folder(m.build.key()) / m.digest.hex for m in (bloom, sprout))
    whole = {path: path.read_bytes() for path in (attestation, key, lost, gone_key)}
    flip(attestation, 300)
    flip(key, 30)
    lost.unlink()
    gone_key.unlink()
    damaged = {path.name: path.read_bytes() for path in (attestation, key)}
    rows = pair.a.json("repair", "plant@bloom", "plant@sprout")["objects"]
    assert sorted(row["action"] for row in rows) == ["fetched", "replaced", "rewritten", "rewritten"]
    assert {path: path.read_bytes() for path in whole} == whole
    kept = {path.name.rsplit("-", 2)[0]: path.read_bytes() for path in (pair.a.store / "quarantine").iterdir()}
    assert kept == damaged
    assert pair.a.json("verify", "--all")["ok"]


def test_an_attestation_that_is_lost_everywhere_is_said(pair: Pair) -> None:
    store = store_of(pair.a)
    artifact = artifact_of(pair.a, "plant@bloom")
    path = next(store.attestations.paths(artifact))
    flip(path, 300)
    (pair.remote / "attestations" / artifact.hex / path.name).unlink()
    damaged = path.read_bytes()
    rows = pair.a.json("repair", "plant@bloom", code=13)["objects"]
    assert [row["action"] for row in rows] == ["lost"]
    assert path.read_bytes() == damaged


def test_a_whole_artifact_that_the_lock_names_is_had_again(pair: Pair) -> None:
    manifest = store_of(pair.a).manifest(artifact_of(pair.a, "plant@bloom"))
    for digest in [manifest.digest, manifest.by_path["model.safetensors"].digest]:
        pair.a.blob(digest).unlink()
    pair.a.run("repair", "plant@bloom")
    pair.a.run("resolve", "plant@bloom")


def test_resolve_makes_the_damaged_view_again_after_repair(pair: Pair) -> None:
    shard = Path(pair.a.json("resolve", "plant")["path"]) / "model.safetensors"
    whole = shard.read_bytes()
    flip(shard.resolve(), 60)
    pair.a.run("repair", "plant")
    pair.a.run("resolve", "plant")
    assert shard.read_bytes() == whole


def test_repair_goes_one_way_at_a_time_and_wants_a_store(pair: Pair) -> None:
    pair.a.run("repair", "--from", "shared", "--to-remote", "shared", code=2)
    pair.a.run("repair", "--from", "nowhere", code=2)
    pair.a.run("repair", "--from-store", str(pair.folder), code=10)


def test_nothing_else_repairs(pair: Pair) -> None:
    flip(pair.a.blob(blobs_of(pair, "plant@bloom")["shard"]), 60)
    before = {name: data for name, data in pair.a.listing().items() if name.startswith(".vpstore/")}
    for command, code in {"resolve plant": 13, "verify": 3, "ls": 0, "push": 0, "pull": 13, "show plant": 13}.items():
        pair.a.run(*command.split(), code=code)
        assert {name: data for name, data in pair.a.listing().items() if name.startswith(".vpstore/")} == before


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_kind_of_damage_on_the_remote_is_found_and_overwritten(pair: Pair, damage: Damage) -> None:
    whole = pair.objects()
    blobs = blobs_of(pair, "plant@bloom")
    claims = [next(name for name in whole if name.startswith(top)) for top in ("keys/", "attestations/")]
    for name in (wrong := [*map(blob_name, blobs.values()), *claims]):
        damage(pair.remote / name)
    faults = pair.a.json("verify", "--remote", code=3)["faults"]
    assert {fault["blob"] for fault in faults if fault["blob"]} == set(blobs.values())
    assert all(fault["where"].startswith("shared (") for fault in faults)
    assert {fault["where"].split(": ")[-1].split("/")[0] for fault in faults if not fault["blob"]} == {
        "keys",
        "attestations",
    }
    assert pair.a.run("verify", "--remote", "plant@bloom", code=3).stdout.count("expected") >= len(blobs)
    assert pair.a.json("verify")["ok"]  # the store is another matter
    planned = pair.a.json("repair", "--to-remote", "shared", "--dry-run")["objects"]
    assert pair.objects() != whole
    done = pair.a.json("repair", "--to-remote", "shared")["objects"]
    assert planned == done
    assert sorted(row["name"] for row in done) == sorted(wrong)
    assert {row["action"] for row in done} == {"fetched" if damage is gone else "replaced"}
    assert pair.objects() == whole
    assert pair.a.json("verify", "--remote", "--all")["ok"]


def test_a_damaged_blob_here_never_overwrites_a_damaged_one_there(pair: Pair) -> None:
    digest = blobs_of(pair, "plant@bloom")["shard"]
    flip(pair.a.blob(digest), 60)
    flip(remote_blob(pair, digest), 61)
    before = pair.objects()
    failures = pair.a.json("repair", "--to-remote", "shared", code=13)["failures"]
    assert "plant@bloom, model.safetensors" in failures[0]["where"]
    assert pair.objects() == before


def test_strangers_on_a_remote_are_faults_only_with_all(pair: Pair) -> None:
    artifact = artifact_of(pair.a, "plant@bloom")
    for name, data in {
        "blobs/blake3/ab/notadigest": b"x",
        f"blobs/blake3/00/{'0' * 62}": b"not these bytes",
        "attestations/strange/file.json": b"{}",
        f"attestations/{'1' * 64}/{'2' * 64}.json": b"{}",
        f"keys/11/{'1' * 64}/{artifact.hex}": b"{}",
    }.items():
        (pair.remote / name).parent.mkdir(parents=True, exist_ok=True)
        (pair.remote / name).write_bytes(data)
    assert pair.a.json("verify", "--remote")["ok"]
    faults = pair.a.json("verify", "--remote", "--all", code=3)["faults"]
    where = " ".join(fault["where"] for fault in faults)
    for part in ("notadigest", "000000000000", "strange", "1" * 64, "2" * 64):
        assert part in where


def test_a_forged_claim_on_the_remote_is_a_fault(pair: Pair) -> None:
    manifest = store_of(pair.a).manifest(artifact_of(pair.a, "plant@bloom"))
    folder = f"keys/{manifest.build.key().hex[:2]}/{manifest.build.key().hex}"
    (pair.remote / folder / ("3" * 64)).write_bytes((pair.remote / folder / manifest.digest.hex).read_bytes())
    faults = pair.a.json("verify", "--remote", "plant@bloom", code=3)["faults"]
    assert ["3" * 64 in fault["where"] for fault in faults] == [True]
    done = pair.a.json("repair", "plant@bloom", "--to-remote", "shared", code=13)["objects"]
    assert [row["action"] for row in done] == ["lost"]
    assert "remove it from the remote" in done[0]["next_step"]
    (pair.remote / done[0]["name"]).unlink()
    pair.a.run("verify", "--remote", "plant@bloom")


def test_a_remote_that_lacks_everything_is_filled_by_repair(pair: Pair) -> None:
    config = pair.a.root / ".dvc" / "config"
    config.write_text(config.read_text() + f"['remote \"other\"']\n    url = {pair.folder / 'other'}\n")
    (pair.folder / "other").mkdir()
    assert len(pair.a.json("verify", "--remote", "-r", "other", code=3)["faults"]) > 20
    (pair.folder / "other").rmdir()
    pair.a.run("repair", "--to-remote", "other")
    assert objects(pair.folder / "other" / "vpstore") == pair.objects()
    assert named_by_remote(pair.folder / "other" / "vpstore") == []
    document = json.loads(pair.a.run("verify", "--remote", "-r", "other", "--json").stdout)
    assert document == {"schema": 1, "ok": True, "place": f"the remote other ({pair.folder / 'other'})", "faults": []}
