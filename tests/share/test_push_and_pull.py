"""push and pull through a local DVC remote: only what is missing moves, and what came is as if it had been built."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from damage_tools import flip, truncate
from two_checkouts import (
    STAGES,
    Pair,
    artifact_of,
    configure,
    fresh_clone,
    lock_of,
    named_by_remote,
    objects,
    recipes_run,
    remote_blob,
    store_of,
    take_lock,
)  # fmt: skip

from vpstore.schema.digest import Digest
from vpstore.storage.remotes.base import attestations_prefix, blob_name, key_name


def bloom(pair: Pair, step: int) -> None:
    """B changes one config, builds, locks."""
    plant = pair.b.root / "configs" / "plant.toml"
    plant.write_text(plant.read_text().replace("[bloom]\nstep = 2", f"[bloom]\nstep = {step}"))
    pair.b.run("build", "plant@bloom")
    pair.b.run("lock", "plant@bloom")


def test_a_fresh_clone_finds_everything_built(pair: Pair) -> None:
    pair.b.run("pull")
    assert recipes_run(pair.b, "build", "--all") == []
    for ref in STAGES:
        assert pair.b.json("resolve", ref)["artifact"] == artifact_of(pair.a, ref)
    assert pair.b.json("verify", "--all")["ok"]
    slugs = [ref.replace("@", "-") for ref in STAGES]
    assert [pair.b.pointer(slug).read_bytes() for slug in slugs] == [
        pair.a.pointer(slug).read_bytes() for slug in slugs
    ]


def test_without_a_pull_the_clone_builds(pair: Pair) -> None:
    """The negative control of the test above."""
    assert len(recipes_run(pair.b, "build", "--all")) == 2


def test_the_remote_has_the_whole_lineage_and_names_nothing_that_it_lacks(pair: Pair) -> None:
    assert named_by_remote(pair.remote) == []
    have = pair.objects()
    for ref in STAGES:
        manifest = store_of(pair.a).manifest(artifact_of(pair.a, ref))
        wanted = [blob_name(digest) for digest in [manifest.digest, *manifest.blobs()]]
        assert {*wanted, key_name(manifest.build.key(), manifest.digest)} <= have.keys()
        assert any(name.startswith(attestations_prefix(manifest.digest)) for name in have)


def test_what_is_there_does_not_move_again(pair: Pair) -> None:
    before = {name: (pair.remote / name).stat() for name in pair.objects()}
    again = pair.a.json("push")
    assert (again["objects_moved"], again["objects_present"]) == (0, len(before))
    assert {name: (pair.remote / name).stat() for name in pair.objects()} == before
    first = pair.b.json("pull")
    assert first["objects_moved"] > 20
    assert pair.b.json("pull")["objects_moved"] == 0


def test_only_what_changed_moves_in_both_directions(pair: Pair) -> None:
    pair.b.run("pull")
    bloom(pair, 5)
    before = pair.objects()
    pushed = pair.b.json("push")
    new = {name: data for name, data in pair.objects().items() if name not in before}
    assert {row["name"]: row["size_bytes"] for row in pushed["objects"]} == {n: len(data) for n, data in new.items()}
    manifest = store_of(pair.b).manifest(artifact_of(pair.b, "plant@bloom"))
    changed = {"model.safetensors", "reports/metrics.json", "provenance.json", "tensor table of model.safetensors"}
    assert sorted(new) == sorted(
        [blob_name(digest) for digest, what in manifest.blobs().items() if what in changed]
        + [blob_name(manifest.digest), key_name(manifest.build.key(), manifest.digest)]
        + [name for name in new if name.startswith(attestations_prefix(manifest.digest))]
    )
    take_lock(pair.b, pair.a)
    pulled = pair.a.json("pull")
    assert {row["name"] for row in pulled["objects"]} == {name for name in new if not name.startswith("keys/")}
    assert pulled["bytes_moved"] == sum(len(data) for name, data in new.items() if not name.startswith("keys/"))
    assert recipes_run(pair.a, "build", "plant@bloom") == []
    assert pair.a.json("resolve", "plant")["artifact"] == artifact_of(pair.b, "plant@bloom")


def test_a_pointer_that_is_there_stays_and_is_said_to_differ(pair: Pair) -> None:
    pair.b.run("pull")
    bloom(pair, 5)
    pair.b.run("push")
    take_lock(pair.b, pair.a)
    mine = pair.a.pointer("plant-bloom").read_bytes()
    assert "the pointer here says" in pair.a.run("pull").stderr
    assert pair.a.pointer("plant-bloom").read_bytes() == mine
    roots = [json.loads(path.read_text()) for path in (pair.a.store / "roots").glob("*.json")]
    held = next(root["artifacts"] for root in roots if root["checkout"] == str(pair.a.root))
    assert held["lock tiny/plant@bloom"] == artifact_of(pair.b, "plant@bloom")


def test_one_ref_brings_its_ancestors_and_nothing_else(pair: Pair) -> None:
    report = pair.b.json("pull", "plant@sprout")
    assert [row["ref"] for row in report["artifacts"]] == ["seed@main", "plant@sprout"]
    store = store_of(pair.b)
    assert store.blobs.has(artifact_of(pair.a, "seed@main"))
    assert not store.blobs.has(artifact_of(pair.a, "plant@bloom"))
    pair.b.run("resolve", "plant@sprout")
    pair.b.run("resolve", "plant@bloom", code=12)


@pytest.mark.parametrize("verb", ["push", "pull"])
def test_a_dry_run_says_what_would_move_and_changes_nothing(pair: Pair, verb: str) -> None:
    project, remote = pair.b, pair.remote
    if verb == "push":
        project, remote = pair.a, pair.folder / "empty" / "vpstore"
        configure(project, pair.folder / "empty")
    files, there = project.listing(), objects(remote)
    planned = project.json(verb, "--dry-run")
    assert (project.listing(), objects(remote)) == (files, there)
    assert project.store.exists() == (verb == "push")
    assert remote.exists() == (verb == "pull")
    done = project.json(verb)
    assert planned["dry_run"]
    assert {row["name"] for row in planned["objects"]} == {row["name"] for row in done["objects"]}


@pytest.mark.parametrize("damage", [flip, truncate])
def test_a_damaged_blob_is_not_uploaded_and_everything_else_goes(pair: Pair, damage: object) -> None:
    configure(pair.a, pair.folder / "other")
    digest = next(
        row.digest
        for row in store_of(pair.a).manifest(artifact_of(pair.a, "plant@bloom")).files
        if row.path == "model.safetensors"
    )
    path = pair.a.blob(digest)
    flip(path, 50) if damage is flip else truncate(path)
    done = pair.a.json("push", code=13)
    remote = pair.folder / "other" / "vpstore"
    assert named_by_remote(remote) == []
    assert not (remote / blob_name(digest)).exists()
    complete = {row["ref"]: row["complete"] for row in done["artifacts"]}
    assert complete == {ref: ref not in ("plant@bloom", "reports@plant-bloom") for ref in STAGES}
    assert [failure["exit_code"] for failure in done["failures"]] == [13]
    assert "plant@bloom, model.safetensors" in done["failures"][0]["where"]
    assert "vpstore repair" in done["failures"][0]["next_step"]


def test_a_blob_that_the_remote_has_need_not_be_here(pair: Pair) -> None:
    digest = store_of(pair.a).manifest(artifact_of(pair.a, "plant@bloom")).by_path["model.safetensors"].digest
    pair.a.blob(digest).unlink()
    assert pair.a.json("push")["objects_moved"] == 0
    remote_blob(pair, digest).unlink()
    failure = pair.a.json("push", code=12)["failures"][0]
    assert failure["expected"] == digest


def test_an_object_of_another_size_is_replaced(pair: Pair) -> None:
    names = list(pair.objects())
    spoiled = [next(n for n in names if n.startswith(top)) for top in ("attestations/", "keys/", "blobs/")]
    before = pair.objects()
    for name in spoiled:
        truncate(pair.remote / name)
    assert {row["name"] for row in pair.a.json("push")["objects"]} == set(spoiled)
    assert pair.objects() == before


def test_a_damaged_blob_here_is_reported_by_pull_and_left_to_repair(pair: Pair) -> None:
    pair.b.run("pull")
    digest = store_of(pair.b).manifest(artifact_of(pair.a, "plant@bloom")).by_path["model.safetensors"].digest
    flip(pair.b.blob(digest), 60)
    damaged = pair.b.blob(digest).read_bytes()
    failure = pair.b.json("pull", code=13)["failures"][0]
    assert "vpstore repair" in failure["next_step"]
    assert pair.b.blob(digest).read_bytes() == damaged
    assert not list((pair.b.store / "quarantine").iterdir())


@pytest.mark.parametrize(("damage", "code"), [(Path.unlink, 12), (truncate, 13)])
@pytest.mark.parametrize("part", [pytest.param("shard", marks=pytest.mark.slow), "manifest"])
def test_a_parent_that_the_remote_lost_is_reported_and_the_child_comes_without_a_pointer(
    pair: Pair, damage: Callable[[Path], None], code: int, part: str
) -> None:
    manifest = store_of(pair.a).manifest(artifact_of(pair.a, "plant@sprout"))
    digest = manifest.digest if part == "manifest" else manifest.by_path["model.safetensors"].digest
    whole = remote_blob(pair, digest).read_bytes()
    damage(remote_blob(pair, digest))
    report = pair.b.json("pull", code=code)
    rows = {row["ref"]: row for row in report["artifacts"]}
    assert [ref for ref, row in rows.items() if not row["complete"]] == ["plant@sprout"]
    lacking = ("plant@bloom", "reports@plant-sprout", "reports@plant-bloom")
    assert {ref: row["lacks"] for ref, row in rows.items() if row["lacks"]} == dict.fromkeys(lacking, ["plant@sprout"])
    said = pair.b.run("pull", code=code).stdout
    assert f"lineage incomplete: plant@bloom  {artifact_of(pair.a, 'plant@bloom').short}, lacks plant@sprout" in said
    assert pair.b.pointer("seed-main").exists()
    assert not any(pair.b.pointer(ref.replace("@", "-")).exists() for ref in ("plant@sprout", *lacking))
    for ref in lacking:
        assert pair.b.json("resolve", ref)["artifact"] == artifact_of(pair.a, ref)
    pair.b.run("resolve", "plant@sprout", code=12)
    assert not store_of(pair.b).blobs.has(manifest.digest)
    pair.b.run("gc", "--grace", "0")  # the lock's entries keep what came
    pair.b.run("resolve", "plant@bloom")
    remote_blob(pair, digest).parent.mkdir(exist_ok=True)
    remote_blob(pair, digest).unlink(missing_ok=True)
    remote_blob(pair, digest).write_bytes(whole)
    assert not any(row["lacks"] for row in pair.b.json("pull")["artifacts"])
    assert recipes_run(pair.b, "build", "--all") == []
    assert pair.b.json("audit", "reports@plant-bloom")["ok"]


def test_a_pointer_that_is_there_stays_though_an_ancestor_is_lost(pair: Pair) -> None:
    pair.b.run("pull")
    digest = store_of(pair.b).manifest(artifact_of(pair.a, "seed@main")).by_path["model.safetensors"].digest
    for path in (pair.b.blob(digest), remote_blob(pair, digest)):
        path.unlink()
    before = pair.b.pointer("plant-bloom").read_bytes()
    rows = {row["ref"]: row["lacks"] for row in pair.b.json("pull", code=12)["artifacts"]}
    assert rows["reports@plant-bloom"] == ["seed@main"]
    assert pair.b.pointer("plant-bloom").read_bytes() == before


def test_what_comes_from_a_donor_goes_like_anything_else(pair: Pair) -> None:
    pair.b.run("pull", "seed")
    manifest = store_of(pair.b).manifest(artifact_of(pair.a, "seed@main"))
    assert {row.path for row in manifest.files} == {"config.json", "model.safetensors"}
    assert all(store_of(pair.b).blobs.is_whole(row.digest, full=True) for row in manifest.files)


def test_many_blobs_are_looked_up_by_folder(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from vpstore.narration import Silent
    from vpstore.sharing import crew
    from vpstore.storage.remotes.directory import DirectoryRemote

    remote = DirectoryRemote(pair.folder / "remote", "shared")
    digests = [*store_of(pair.a).blobs.all(), Digest.of(b"nowhere")]
    with crew.Crew(Silent(), "look") as at_work:
        one_by_one = crew.blob_sizes(at_work, remote, digests)
        monkeypatch.setattr(crew, "MANY", 2)
        assert crew.blob_sizes(at_work, remote, digests) == one_by_one
    assert len(one_by_one) == len(digests) - 1


def test_what_a_person_gets_wrong_has_an_exit_code_and_a_next_step(pair: Pair) -> None:
    assert "dvc remote add" in pair.b.run("pull", "-r", "nowhere", code=2).stderr
    assert "no such profile" in pair.b.run("pull", "--profile", "huge", code=2).stderr
    assert "the lock names nothing" in pair.b.run("pull", "--profile", "large", code=11).stderr
    assert "nothing is built" in pair.a.run("push", "--profile", "large", code=11).stderr
    pair.b.run("pull", "tree", code=11)
    pair.b.run("pull", "-j", "0", code=2)
    (pair.b.root / ".dvc" / "config").unlink()
    assert "no remote is named" in pair.b.run("pull", code=2).stderr
    fresh_clone(pair.a, pair.folder / "c").run("push", code=10)


def test_two_profiles_are_pulled_each_by_its_own_lock(pair: Pair) -> None:
    pair.a.run("build", "--all", "--profile", "large")
    pair.a.run("lock", "--profile", "large")
    pair.a.run("push", "--profile", "large")
    take_lock(pair.a, pair.b)
    pair.b.run("pull", "--profile", "large")
    assert pair.b.pointer("plant-bloom", "large").exists()
    assert not pair.b.pointer("plant-bloom", "tiny").exists()
    assert set(lock_of(pair.b)) == set(STAGES)


def test_what_the_lock_does_not_say_is_counted_and_three_are_named(pair: Pair) -> None:
    pair.a.root.joinpath("vpstore.lock").unlink()
    said = pair.a.run("push", "--dry-run").stderr
    assert "5 of what is sent is not what vpstore.lock says (seed@main, plant@sprout, plant@bloom and 2 more)" in said
    assert "reports@plant-bloom" not in said


def test_without_a_remote_nothing_else_is_said(pair: Pair) -> None:
    pair.a.root.joinpath("vpstore.lock").unlink()
    pair.a.root.joinpath(".dvc", "config").write_text("")
    said = pair.a.run("push", code=2).stderr
    assert said.startswith("error: no remote is named")
    assert "vpstore.lock" not in said
