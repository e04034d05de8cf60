"""Checkouts that are moved, removed, shut, damaged, or not the one they seem to be: nothing of theirs is lost."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from shared_store import Member, Team, remove

from vpstore.holdings import Holdings
from vpstore.schema.digest import Digest


def state(document: Any, root: Path) -> Any:
    return next(row for row in document["checkouts"] if row["path"] == str(root))


@pytest.fixture
def ada(team: Team) -> Member:
    made = team.checkout("ada")
    made.build()
    return made


@pytest.fixture
def bob(team: Team, ada: Member) -> Member:
    made = team.checkout("bob", bloom=5)
    made.build()
    return made


def held(team: Team, root: Path) -> set[str]:
    return {a for record in team.store.roots.checkouts() if record.checkout == root for a in record.artifacts.values()}


def test_a_checkout_that_is_gone_keeps_what_it_had_until_it_is_forgotten(team: Team, ada: Member, bob: Member) -> None:
    artifacts = held(team, ada.root)
    shutil.rmtree(ada.root)
    document = bob.gc()
    assert state(document, ada.root)["state"] == "gone"
    assert all(team.has(artifact) for artifact in artifacts)
    assert f"vpstore gc --forget {ada.root}" in bob.run("gc").stdout
    before = {path.name for path in (team.root / "roots").iterdir()}
    document = bob.gc("--dry-run", "--forget", str(ada.root))
    assert document["forgotten"] == [str(ada.root)]
    assert document["totals"]["goes"]["blobs"] > 0
    assert {path.name for path in (team.root / "roots").iterdir()} == before
    assert f"{ada.root}: forgotten" in bob.run("gc", "--forget", str(ada.root), "--grace", "0").stdout
    assert not all(team.has(artifact) for artifact in artifacts)
    bob.verify()
    team.check_names()
    bob.gc("--forget", str(ada.root), code=2)  # not known any more


def test_a_checkout_that_is_there_is_not_forgotten(team: Team, ada: Member, bob: Member) -> None:
    document = bob.json("gc", "--forget", str(ada.root), code=2)
    assert "pointers" in document["error"]["next_step"]
    bob.gc()
    ada.verify()


def test_a_moved_checkout_makes_itself_known_again(team: Team, ada: Member, bob: Member) -> None:
    moved = team.folder / "moved"
    ada.root.rename(moved)
    away = Member(moved, ada.cache, ada.environment)
    away.run("resolve", "plant")  # any command that makes or finds a view
    document = bob.gc("--forget", str(ada.root))
    assert state(document, moved)["state"] == "read"
    away.run("resolve", "plant", "--full")


@pytest.mark.parametrize(
    "damage", ["pyproject.toml", "weights/tiny/refs/plant-bloom.json", "weights/tiny/refs", "weights"]
)
def test_what_is_damaged_or_unmounted_keeps_what_it_had(team: Team, ada: Member, bob: Member, damage: str) -> None:
    for ref in ("seed@main", "plant@sprout", "plant@bloom"):
        ada.drop(ref, "view")
    path = ada.root / damage
    if path.is_dir():
        path.rename(path.with_name("elsewhere"))
        path.symlink_to("/nowhere/at/all")
    else:
        path.write_text("<<<<<<< HEAD\n")
    artifacts = held(team, ada.root)
    row = state(bob.gc(), ada.root)
    assert row["state"] in ("in part", "unreadable")
    assert str(path) in row["detail"]
    assert all(team.has(artifact) for artifact in artifacts)
    assert held(team, ada.root) == artifacts
    bob.gc()
    assert all(team.has(artifact) for artifact in artifacts)


def test_control_a_damaged_checkout_taken_for_a_whole_one_loses(
    team: Team, ada: Member, bob: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts = held(team, ada.root)
    for ref in ("seed@main", "plant@sprout", "plant@bloom"):
        ada.drop(ref, "view")
    ada.pointer("plant-bloom").write_text("<<<<<<< HEAD\n")
    monkeypatch.setattr(Holdings, "is_whole", True)
    bob.collect()
    assert not all(team.has(artifact) for artifact in artifacts)


def test_a_lock_that_cannot_be_read_and_was_never_recorded_stops_gc(team: Team, ada: Member, bob: Member) -> None:
    (ada.root / "vpstore.lock").write_text("<<<<<<< HEAD\n")
    bob.set_steps(bloom=6)
    bob.build()
    before = team.blobs()
    error = bob.gc(code=14)["error"]
    assert str(ada.root / "vpstore.lock") in error["where"]
    assert team.blobs() == before
    (ada.root / "vpstore.lock").unlink()
    ada.run("lock")
    bob.gc()
    (ada.root / "vpstore.lock").write_text("<<<<<<< HEAD\n")  # now it is known what it had
    bob.gc()
    ada.run("resolve", "plant", "--full", code=14)  # its own trouble, not gc's


def test_a_damaged_root_file_stops_gc(team: Team, ada: Member, bob: Member) -> None:
    for damage in (b"{}", b"", b"<<<<<<<"):
        path = next(path for path in (team.root / "roots").glob("*.json") if str(ada.root) in path.read_text())
        data = path.read_bytes()
        path.write_bytes(damage)
        before = team.blobs()
        error = bob.gc(code=14)["error"]
        assert str(path) in error["where"]
        assert "vpstore build --all" in error["next_step"]
        assert team.blobs() == before
        path.write_bytes(data)
    other = next(path for path in (team.root / "roots").glob("*.json") if str(bob.root) in path.read_text())
    path.write_bytes(other.read_bytes())  # a root file of another checkout
    bob.gc(code=14)
    path.unlink()
    ada.run("resolve", "plant")
    bob.gc()
    ada.verify()


@pytest.mark.slow
def test_two_checkouts_at_one_path_are_told_apart(team: Team, ada: Member, bob: Member) -> None:
    """As in two containers that both have the project at one path, and share a store."""
    artifacts = held(team, ada.root)
    ada.root.rename(team.folder / "hidden")
    again = team.checkout("ada", bloom=7)
    again.build("seed")
    document = again.gc()
    states = {row["state"] for row in document["checkouts"] if row["path"] == str(ada.root)}
    assert states == {"read", "another"}
    assert all(team.has(artifact) for artifact in artifacts)
    shutil.rmtree(again.root)
    (team.folder / "hidden").rename(ada.root)
    ada.verify()
    assert {row["state"] for row in bob.gc()["checkouts"] if row["path"] == str(ada.root)} == {"read", "another"}
    bob.gc("--forget", str(ada.root))  # the one that is not there
    assert {row["state"] for row in bob.gc()["checkouts"] if row["path"] == str(ada.root)} == {"read"}
    ada.verify()


def test_removed_weights_are_taken_for_another_checkout_until_it_is_forgotten(
    team: Team, ada: Member, bob: Member
) -> None:
    artifacts = held(team, ada.root)
    shutil.rmtree(ada.root / "weights")
    assert state(bob.gc(), ada.root)["state"] == "another"
    assert all(team.has(artifact) for artifact in artifacts)
    bob.gc("--forget", str(ada.root))
    assert not all(team.has(artifact) for artifact in artifacts)


def test_what_gc_reads_is_what_is_kept_when_it_cannot_be_read_any_more(team: Team, ada: Member, bob: Member) -> None:
    old = held(team, ada.root)
    ada.set_steps(bloom=8)
    new = ada.build()["plant@bloom"]
    for view in (ada.root / "weights/tiny").glob("plant@bloom-*"):
        remove(view)
    assert held(team, ada.root) > old  # the view of the old one is still recorded
    bob.gc()
    assert new in held(team, ada.root)
    assert not held(team, ada.root) >= old
    shutil.rmtree(ada.root)
    bob.gc()
    assert team.has(new)


def test_a_pointer_that_came_by_hand_is_found_by_reading(team: Team, ada: Member, bob: Member) -> None:
    before = Digest(ada.pointed("plant-bloom")["artifact"])
    for suffix in (".json", ".artifact"):
        shutil.copy(ada.pointer("plant-bloom").with_suffix(suffix), bob.pointer("plant-bloom").with_suffix(suffix))
    shutil.rmtree(ada.root)
    bob.gc("--forget", str(ada.root))
    assert team.has(before)


def test_a_checkout_whose_path_is_no_text_can_be_told_and_forgotten(team: Team, ada: Member, bob: Member) -> None:
    strange = ada.root.with_name("\udcff")
    ada.root.rename(strange)
    team.store.roots.hold(strange, "tiny/any@thing", Digest.of(b"never here"))
    document = bob.gc("--forget", str(ada.root))
    assert {row["path"] for row in document["checkouts"]} == {str(bob.root), str(team.folder / "\\udcff")}
    shutil.rmtree(strange)
    assert "udcff (gone)" in bob.run("gc").stdout
