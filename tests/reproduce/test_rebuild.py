"""resolve --rebuild: bytes that are nowhere are made again, and count only if they are the ones that were asked for."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from garden_project import edit, git_commit, manifest_of, open_store, pointer_of, wipe_blobs, wipe_store
from small_project import Project

from vpstore.schema.digest import Digest


def shard_digests(project: Project, ref: str) -> list[str]:
    return [row["digest"] for row in manifest_of(project, ref)["files"] if row["path"].startswith("model-")]


def attestations(listing: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in listing.items() if "/attestations/" in name}


def without_attestations(listing: dict[str, bytes]) -> dict[str, bytes]:
    """What must come back bit for bit; a new build has an attestation of its own, and its view lists that."""
    return {n: d for n, d in listing.items() if "/attestations/" not in n and not n.endswith(".intoto.jsonl")}


def begun(log: Path) -> int:
    return log.read_text().count(" begin ") if log.exists() else 0


def test_wiped_blobs_come_back_from_the_recorded_recipe(garden: Project, tmp_path: Path) -> None:
    before, log = garden.listing(), tmp_path / "log"
    wipe_blobs(garden, shard_digests(garden, "plant"))
    assert garden.run("resolve", "plant", code=12).stdout == ""
    edit(garden, "small/grow.py", "STRENGTH = 1", "STRENGTH = 2")
    path = garden.run("resolve", "plant", "--rebuild", GARDEN_LOG=str(log)).stdout.strip()
    assert pointer_of(garden, "plant-bloom")["artifact"][7:19] in path
    assert (Path(path) / "model-a.safetensors").is_file()
    assert begun(log) == 1  # the parent is here and is not built again
    assert without_attestations(garden.listing()) == without_attestations(before)
    assert len(attestations(garden.listing())) == len(attestations(before)) + 1
    assert garden.run("verify", "--all").stdout == "no faults in the store .vpstore\n"
    garden.run("resolve", "plant", "--rebuild", GARDEN_LOG=str(log))
    assert begun(log) == 1  # nothing to do


def test_missing_parents_are_rebuilt_first(garden: Project, tmp_path: Path) -> None:
    before, log = garden.listing(), tmp_path / "log"
    wipe_blobs(garden, [*shard_digests(garden, "plant"), *shard_digests(garden, "plant@sprout")])
    wipe_blobs(garden, [pointer_of(garden, "plant-sprout")["artifact"]])  # and its manifest
    garden.run("resolve", "plant", "--rebuild", GARDEN_LOG=str(log))
    assert begun(log) == 2
    assert without_attestations(garden.listing()) == without_attestations(before)


@pytest.mark.parametrize("has_pointers", [True, False], ids=["pointers and lock", "lock only"])
def test_a_wiped_store_comes_back_from_the_working_tree(garden: Project, has_pointers: bool) -> None:
    garden.run("lock")
    artifact = pointer_of(garden, "reports-plant-bloom")["artifact"]
    wipe_store(garden)
    if not has_pointers:
        shutil.rmtree(garden.root / "weights")
    done = garden.json("resolve", "reports@plant-bloom", "--locked", "--rebuild")
    assert (done["artifact"], done["locked"]) == (artifact, "same")
    assert (Path(done["path"]) / "reports/metrics.json").is_file()
    assert garden.json("resolve", "plant@sprout", "--rebuild")["path"]
    if has_pointers:
        assert (
            garden.run("verify", "reports@plant-bloom", "plant", "seed").stdout == "no faults in the store .vpstore\n"
        )


def test_pointers_alone_are_enough(garden: Project) -> None:
    artifact = pointer_of(garden, "plant-bloom")["artifact"]
    wipe_store(garden)
    assert garden.json("resolve", "plant", "--rebuild")["artifact"] == artifact


@pytest.mark.parametrize("has_manifests", [True, False])
def test_other_bytes_do_not_count_and_leave_the_store_as_it_was(garden: Project, has_manifests: bool) -> None:
    garden.run("lock")
    asked = pointer_of(garden, "plant-bloom")["artifact"]
    if has_manifests:
        wipe_blobs(garden, shard_digests(garden, "plant"))
    else:
        wipe_blobs(garden, [asked, *shard_digests(garden, "plant")])
    before = garden.listing()
    error = garden.run("resolve", "plant", "--rebuild", code=13, GARDEN_NUDGE="b.weight:5").stderr
    assert asked in error
    assert "nothing was published" in error
    assert ("1 of 8 tensors" in error and "tensor b.weight" in error) == has_manifests
    assert garden.listing() == before
    assert list((garden.store / "work").iterdir()) == []
    garden.run("resolve", "plant", "--rebuild")  # the honest recipe still does


def test_a_parent_that_comes_out_differently_stops_the_chain(garden: Project) -> None:
    wipe_blobs(garden, [*shard_digests(garden, "plant"), *shard_digests(garden, "plant@sprout")])
    before = garden.listing()
    error = garden.run("resolve", "plant", "--rebuild", code=13, GARDEN_NUDGE="a.bias:1").stderr
    assert "plant@sprout, key" in error
    assert garden.listing() == before


def test_an_edited_working_tree_cannot_stand_in_for_a_wiped_store(garden: Project) -> None:
    commit = git_commit(garden)
    garden.run("build", "--force", "plant")
    kept = garden.store / "attestations"
    shutil.copytree(kept, garden.cache / "attestations")
    wipe_store(garden)
    edit(garden, "small/grow.py", "STRENGTH = 1", "STRENGTH = 2")
    key = pointer_of(garden, "plant-bloom")["key"]
    error = garden.run("resolve", "plant", "--rebuild", code=12).stderr
    assert f"build key {key[7:19]} (the pointer)" in error
    assert "check out the commit" in error
    assert not list((garden.store / "blobs" / "blake3").rglob("??????*"))
    shutil.copytree(garden.cache / "attestations", kept, dirs_exist_ok=True)
    assert f"git checkout {commit}" in garden.run("resolve", "plant", "--rebuild", code=12).stderr


def test_a_lost_recipe_file_is_taken_from_the_checkout_if_it_is_the_same(garden: Project) -> None:
    files = manifest_of(garden, "plant")["build"]["recipe"]["files"]
    [grow] = [row["digest"] for row in files if row["path"] == "small/grow.py"]
    wipe_blobs(garden, [*shard_digests(garden, "plant"), grow])
    edit(garden, "small/grow.py", "STRENGTH = 1", "STRENGTH = 2")
    error = garden.run("resolve", "plant", "--rebuild", code=12).stderr
    assert "git checkout the commit in which it was built" in error
    edit(garden, "small/grow.py", "STRENGTH = 2", "STRENGTH = 1")
    garden.run("resolve", "plant", "--rebuild")
    assert garden.run("verify", "--all").stdout == "no faults in the store .vpstore\n"


def test_a_damaged_blob_goes_to_quarantine(garden: Project) -> None:
    digest = shard_digests(garden, "plant")[0]
    healthy = garden.blob(digest).read_bytes()
    garden.blob(digest).chmod(0o644)
    garden.blob(digest).write_bytes(b"damage")
    garden.run("resolve", "plant", code=13)
    garden.run("resolve", "plant", "--rebuild")
    assert garden.blob(digest).read_bytes() == healthy
    assert [path.read_bytes() for path in (garden.store / "quarantine").iterdir()] == [b"damage"]


def test_without_the_option_nothing_runs(garden: Project, tmp_path: Path) -> None:
    wipe_blobs(garden, shard_digests(garden, "plant"))
    before = garden.listing()
    garden.run("resolve", "plant", code=12, GARDEN_LOG=str(tmp_path / "log"))
    assert not (tmp_path / "log").exists()
    assert garden.listing() == before


def test_the_lock_is_kept_and_gates_are_held(garden: Project) -> None:
    wipe_blobs(garden, shard_digests(garden, "plant"))
    assert "the lock does not name it" in garden.run("resolve", "plant", "--rebuild", "--locked", code=15).stderr
    before = garden.listing()
    assert "growth is too slow" in garden.run("resolve", "plant", "--rebuild", code=20, GARDEN_FAULT="gate").stderr
    assert garden.listing() == before


def test_a_ref_by_digest_is_rebuilt_too(garden: Project) -> None:
    old = pointer_of(garden, "plant-bloom")["artifact"]
    digests = shard_digests(garden, "plant")
    edit(garden, "configs/plant.toml", "step = 2", "step = 3")
    garden.run("build", "plant")
    assert pointer_of(garden, "plant-bloom")["artifact"] != old
    wipe_blobs(garden, digests[:1])
    found = garden.json("resolve", f"plant#{old[7:19]}", "--rebuild")
    assert found["artifact"] == old
    assert pointer_of(garden, "plant-bloom")["artifact"] != old  # the pointer is a build's to write


def test_the_python_functions(garden: Project) -> None:
    artifact = pointer_of(garden, "plant-bloom")["artifact"]
    wipe_blobs(garden, shard_digests(garden, "plant"))
    code = "from vpstore import api; print(api.rebuild('plant')); print(api.reproduce('plant')[0].verdict)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=garden.root, env=garden.variables(), check=True, capture_output=True, text=True)
    assert done.stdout.split() == [artifact, "identical"]
    store = open_store(garden)
    assert all(store.blobs.is_whole(digest) for digest in store.manifest(Digest(artifact)).blobs())
