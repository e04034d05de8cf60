"""The lock in git's HEAD: what a forger cannot edit together with all else; and what a lost manifest is called."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from forger import Forger
from orchard import commit, git
from small_project import Project


def found(project: Project, *options: str, code: int = 3) -> Any:
    return project.json("audit", "graft", *options, code=code)


def told(document: Any) -> list[tuple[str, str]]:
    return [(fault["kind"], fault["where"]) for fault in document["faults"]]


def test_a_forgery_with_pointer_and_lock_edited_together_is_not_what_git_has(orchard: Project, forger: Forger) -> None:
    commit(orchard)
    assert found(orchard, "--worktree", code=0)["remarks"] == []
    old = forger.artifact("graft-main")
    new = forger.replace_artifact("graft-main", forger.with_tensor)
    forger.accept(new)
    document = found(orchard)
    assert told(document) == [("lock", "graft@main: lock in git's HEAD")]
    assert document["faults"][0]["expected"] == old
    assert document["chain"][-1]["verdict"] == "differs"
    assert [text for text in document["remarks"] if "changed since the last commit" in text]
    assert told(found(orchard, "--worktree")) == [("lock", "graft@main: lock in git's HEAD")]
    assert "differs  the committed lock's key, other bytes" in orchard.run("audit", "graft", code=3).stdout
    assert found(orchard, "--other-machine", code=0)["ok"]
    assert told(found(orchard, "--other-machine", "--worktree")) == [("stale", "graft@main: vpstore.lock")]
    commit(orchard)
    assert found(orchard, "--worktree", code=0)["ok"]


def test_a_forged_ancestor_shows_where_it_was_forged(orchard: Project, forger: Forger) -> None:
    """Everything above it was linked and locked again, and has other keys."""
    commit(orchard)
    before = {slug: forger.artifact(slug) for slug in ("plant-bloom", "graft-main")}
    bloom = forger.replace_artifact("plant-bloom", forger.with_tensor)
    graft = forger.relink("graft-main", before["plant-bloom"], bloom.digest)
    for manifest in (bloom, graft):
        forger.accept(manifest)
    assert told(found(orchard)) == [("lock", "plant@bloom: lock in git's HEAD")]


def test_a_lock_that_was_taken_away_is_still_the_one_in_git(orchard: Project, forger: Forger) -> None:
    commit(orchard)
    forger.replace_artifact("graft-main", forger.with_tensor)
    (orchard.root / "vpstore.lock").unlink()
    assert told(found(orchard)) == [("lock", "graft@main: lock in git's HEAD")]


def test_a_changed_recipe_that_was_built_and_locked_needs_no_commit(orchard: Project) -> None:
    commit(orchard)
    config = orchard.root / "configs" / "plant.toml"
    config.write_text(config.read_text().replace("step = 1", "step = 7"))
    orchard.run("build", "--all")
    orchard.run("lock")
    document = found(orchard, code=0)
    assert document["ok"]
    assert len([text for text in document["remarks"] if "changed since the last commit" in text]) == 3


@pytest.mark.parametrize("case", ["no git", "never committed"])
def test_without_a_committed_lock_there_is_nothing_to_compare_with(orchard: Project, forger: Forger, case: str) -> None:
    if case == "never committed":
        lock = (orchard.root / "vpstore.lock").read_bytes()
        (orchard.root / "vpstore.lock").unlink()
        commit(orchard)
        (orchard.root / "vpstore.lock").write_bytes(lock)
        assert "vpstore.lock" in git(orchard, "status", "--short")
    forger.accept(forger.replace_artifact("graft-main", forger.with_tensor))
    assert found(orchard, code=0)["ok"]


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_what_the_lock_names_is_vouched_for_also_where_its_manifest_is_lost(
    orchard: Project, forger: Forger, damage: str
) -> None:
    commit(orchard)
    blob = orchard.blob(artifact := forger.artifact("graft-main"))
    blob.chmod(0o644)
    blob.unlink() if damage == "missing" else blob.write_bytes(b"{}")
    document = found(orchard)
    assert document["remarks"] == []
    assert document["chain"][-1]["lock"] == "same"
    assert f"graft@main  {artifact.short}  " in orchard.run("audit", "graft@main", code=3).stdout


def test_a_lost_ancestor_is_called_by_its_ref_and_its_digest_is_printed_once(orchard: Project, forger: Forger) -> None:
    artifact = forger.artifact("plant-bloom")
    orchard.blob(artifact).unlink()
    assert f"parent  plant@bloom  {artifact.short}  missing" in orchard.run("audit", "graft", code=3).stdout
    (orchard.root / "vpstore.lock").unlink()
    assert f"parent  {artifact.short}  missing" in orchard.run("audit", "graft", code=3).stdout
    assert f"parent  {artifact.short}  the store does" in orchard.run("graph", "graft").stdout
    shutil.rmtree(orchard.root / "weights")
    orchard.run("audit", "graft", code=11)
