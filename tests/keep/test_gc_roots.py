"""What gc keeps and what it deletes: every kind of root, with what happens when that kind is not looked at."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from shared_store import Member, Team, reasons, remove

from vpstore import holdings
from vpstore.collecting import marking
from vpstore.schema.digest import Digest
from vpstore.schema.ref import StageRef
from vpstore.storage.pointers import Pointer


def move_on(member: Member, ref: str = "plant@bloom") -> tuple[str, str]:
    """Build another artifact under a ref, and remove the view of the one before; before and after."""
    before = member.build()[ref]
    member.set_steps(bloom=9)
    after = member.build()[ref]
    assert after != before
    remove(next((member.root / "weights/tiny").glob(f"{ref}-{before[7:19]}")))
    return before, after


def test_what_no_root_leads_to_goes_and_the_rest_stays(team: Team) -> None:
    ada = team.checkout("ada")
    before, after = move_on(ada)
    kept = team.store.manifest(Digest(after)).blobs().keys() & team.store.manifest(Digest(before)).blobs().keys()
    assert kept  # the recipe's files, for instance
    document = ada.gc()
    assert document["totals"]["goes"]["blobs"] > 2
    assert not team.has(before)
    assert team.has(after)
    assert all(team.store.blobs.has(digest) for digest in kept)
    assert before[7:] not in team.names()
    ada.verify()
    team.check_names()
    assert ada.gc()["totals"]["goes"]["things"] == 0  # the end state


@pytest.mark.parametrize("kind", ["pointer", "view", "lock"])
def test_each_kind_of_root_alone_keeps_the_whole_lineage(
    team: Team, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    ada, bob = team.checkout("ada"), team.checkout("bob")
    artifacts = ada.build()
    ada.run("lock")
    bob.build("seed")  # somebody else, whose gc it is
    for ref in artifacts:
        ada.drop(ref, *({"pointer", "view", "lock"} - ({kind} if ref == "plant@bloom" else set())))
    assert bob.gc()["totals"]["goes"]["blobs"] == 0
    assert all(team.has(artifact) for artifact in artifacts.values())
    reader = {"pointer": "_read_pointers", "view": "_read_views", "lock": "_read_lock"}[kind]
    monkeypatch.setattr(holdings, reader, lambda path, found: None)
    bob.collect()
    assert not team.has(artifacts["plant@bloom"])
    assert team.has(artifacts["seed@main"])


def test_other_profiles_are_roots_too(team: Team) -> None:
    ada = team.checkout("ada")
    artifacts = {row["ref"]: row["artifact"] for row in ada.json("build", "seed", "--profile", "large")["builds"]}
    ada.set_steps(sprout=7)
    row = ada.json("build", "plant@sprout", "--profile", "large")["builds"][0]
    remove(ada.root / "weights" / "large" / f"plant@sprout-{row['artifact'][7:19]}")
    ada.build("seed")
    assert ada.gc()["totals"]["goes"]["blobs"] == 0  # called under the profile tiny
    assert team.has(row["artifact"])
    assert team.has(artifacts["seed@main"])


def test_the_checkout_in_which_gc_is_called_counts_though_it_is_not_registered(team: Team) -> None:
    ada, bob = team.checkout("ada"), team.checkout("bob")
    artifacts = ada.build()
    ada.run("lock")
    shutil.copy(ada.root / "vpstore.lock", bob.root / "vpstore.lock")  # as git would
    shutil.rmtree(ada.root)
    for path in (team.root / "roots").glob("*.json"):
        path.unlink()
    bob.gc()
    assert all(team.has(artifact) for artifact in artifacts.values())
    (bob.root / "vpstore.lock").unlink()
    bob.gc()
    assert team.blobs() == set()


def test_a_process_at_work_keeps_what_it_names(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    ada = team.checkout("ada")
    before, _ = move_on(ada)
    loose = team.store.blobs.put_bytes(b"on its way")
    with team.store.roots.running(artifacts=[Digest(before)], blobs=[loose]):
        document = ada.gc()
        assert document["processes"] == 1
        assert reasons(document)[before] == (False, f"manifest of plant@bloom {before[7:19]}: process {os.getpid()}")
        assert team.has(before)
        assert team.store.blobs.has(loose)
        monkeypatch.setattr(marking, "_of_processes", lambda store, marks: iter(()))
        ada.collect()
        assert not team.has(before)
        assert not team.store.blobs.has(loose)


def test_an_artifact_on_its_way_keeps_everything_until_it_is_known(team: Team) -> None:
    ada = team.checkout("ada")
    before, _ = move_on(ada)
    coming = Digest.of(b"a manifest that is not here yet")
    with team.store.roots.running(artifacts=[coming]):
        document = ada.gc()
        assert document["totals"]["goes"]["blobs"] == 0
        assert "is bringing" in reasons(document)[before][1]
    with team.store.roots.running(artifacts=[coming], blobs=[coming]):  # its needs are named in full
        ada.gc()
    assert not team.has(before)


def test_a_root_of_a_process_that_died_keeps_nothing(team: Team) -> None:
    ada = team.checkout("ada")
    before, _ = move_on(ada)
    child = os.fork()
    if child == 0:
        with team.store.roots.running(artifacts=[Digest(before)]):
            os._exit(0)
    os.waitpid(child, 0)
    left = list((team.root / "roots/running").iterdir())
    assert len(left) == 1
    document = ada.gc()
    assert reasons(document, "process")[f"roots/running/{left[0].name}"][0]
    assert list((team.root / "roots/running").iterdir()) == []
    assert not team.has(before)


def test_a_nested_lineage_is_kept_through_its_last_artifact(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    ada = team.checkout("ada")
    artifacts = ada.build()
    for ref in ("seed@main", "plant@sprout"):
        ada.drop(ref, "pointer", "view")
    ada.gc()
    assert team.has(artifacts["plant@bloom"])  # which asks for the parents, too
    ada.run("show", "plant")
    manifest = team.store.manifest(Digest(artifacts["plant@bloom"]))
    bare = manifest.build.__class__(manifest.build.entry, manifest.build.recipe_files, manifest.build.params)
    monkeypatch.setattr(marking._Walk, "_manifest", lambda self, *given, **rest: _without_inputs(manifest, bare))
    ada.collect()
    assert not team.store.blobs.has(Digest(artifacts["seed@main"]))


def _without_inputs(manifest: object, bare: object) -> object:
    import dataclasses

    return dataclasses.replace(manifest, build=bare)  # type: ignore[type-var]


def test_a_blob_that_a_kept_artifact_shares_with_one_that_goes_stays(team: Team) -> None:
    """Two artifacts of equal files under two keys: the manifests differ, the shards are one blob."""
    ada = team.checkout("ada")
    first = ada.build()["plant@bloom"]
    (ada.root / "small/grow.py").write_text((ada.root / "small/grow.py").read_text() + "version = 2\n")
    second = ada.build()["plant@bloom"]
    assert first != second
    shards = [team.store.manifest(Digest(a)).by_path["model.safetensors"].digest for a in (first, second)]
    assert shards[0] == shards[1]
    for ref in ("plant@sprout", "plant@bloom"):
        for view in (ada.root / "weights/tiny").glob(f"{ref}-*"):
            remove(view)
    ada.gc()
    assert not team.store.blobs.has(Digest(first))
    assert team.has(second)
    ada.verify()


def test_a_view_counts_by_its_manifest_its_name_and_though_it_was_set_aside(team: Team) -> None:
    ada, bob = team.checkout("ada"), team.checkout("bob")
    bob.build("seed")
    artifact = ada.build()["plant@bloom"]
    view = next((ada.root / "weights/tiny").glob("plant@bloom-*[0-9a-f]"))
    for ref in ("seed@main", "plant@sprout"):
        ada.drop(ref, "pointer", "view")
    ada.drop("plant@bloom", "pointer")
    view.rename(view.with_name(f"{view.name}.changed-1-0"))
    view = view.with_name(f"{view.name}.changed-1-0")
    bob.gc()
    assert team.has(artifact)
    manifest = (view / "artifact.json").read_bytes()
    (view / "artifact.json").unlink()  # only the name is left
    bob.gc()
    assert team.has(artifact)
    (view / "artifact.json").write_bytes(manifest)  # a copy, as a reflink would be, under a name that says nothing
    view.rename(view.with_name("saved"))
    bob.gc()
    assert team.has(artifact)
    remove(view.with_name("saved"))
    bob.gc()
    assert not team.has(artifact)


def test_a_pointer_under_another_name_counts(team: Team) -> None:
    ada, bob = team.checkout("ada"), team.checkout("bob")
    bob.build("seed")
    before, after = move_on(ada)
    ref = StageRef("plant", "bloom")
    ada.pointer("saved").write_bytes(Pointer(ref, Digest(before), Digest(before)).encode())
    bob.gc()
    assert team.has(before)
    assert team.has(after)


def test_a_lock_entry_of_something_that_was_never_here_hides_nothing(team: Team) -> None:
    ada = team.checkout("ada")
    before, _ = move_on(ada)
    ada.run("lock")
    lock = ada.root / "vpstore.lock"
    absent = Digest.of(b"built elsewhere")
    current = ada.pointed("plant-sprout")["artifact"]
    lock.write_text(lock.read_text().replace(current, absent))
    document = ada.gc()
    assert [row["artifact"] for row in document["absent"]] == [absent]
    assert not team.has(before)


def test_dry_run_says_for_each_blob_why_and_changes_nothing(team: Team) -> None:
    ada = team.checkout("ada")
    before, after = move_on(ada)
    listing = {path: path.stat().st_ctime_ns for path in team.root.rglob("*") if "locks" not in path.parts}
    document = ada.gc("--dry-run")
    found = reasons(document)
    assert found.keys() == {str(digest) for digest in team.blobs()}
    assert found[before] == (True, "no root leads to it")
    goes, why = found[after]
    assert not goes
    assert why == f"manifest of plant@bloom {after[7:19]}: tiny/plant@bloom of {ada.root}"
    assert document["totals"]["stays"]["blobs"] + document["totals"]["goes"]["blobs"] == len(found)
    text = ada.run("gc", "--grace", "0", "--dry-run").stdout
    rows = {tuple(line.split()[:2]): line for line in text.splitlines() if before[:19] in line}
    assert rows[("goes", "blob")].endswith(f"{before[:19]}  no root leads to it")
    assert "would free" in text
    assert {path: path.stat().st_ctime_ns for path in team.root.rglob("*") if "locks" not in path.parts} == listing
    real = ada.gc()
    assert reasons(real) == found
    assert {name for name, (goes, _) in found.items() if not goes} == {str(digest) for digest in team.blobs()}


def test_a_store_inside_the_checkout_needs_no_registration(tmp_path: Path) -> None:
    from small_project import make_project

    (tmp_path / "own").mkdir()
    own = make_project(tmp_path / "own", tmp_path / "own-cache")
    own.run("build", "--all")
    assert not (own.root / "weights/.checkout-id").exists()
    assert own.json("gc", "--grace", "0")["totals"]["goes"]["blobs"] == 0
    shutil.rmtree(own.root / "weights")
    own.json("gc", "--grace", "0")
    assert [path for path in (own.store / "blobs").rglob("*") if path.is_file()] == []
