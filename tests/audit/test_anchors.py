"""What an audit believes must be what was committed, and it must say so where git cannot tell what that is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forger import Forger
from orchard import commit, git
from small_project import Project
from test_audit_signatures import trust

STRICT = ("--locked", "--worktree")


def found(project: Project, *options: str, code: int = 3, **more: str) -> Any:
    return project.json("audit", "plant@sprout", *options, code=code, **more)


def told(document: Any) -> list[tuple[str, str]]:
    return [(fault["kind"], fault["where"]) for fault in document["faults"]]


def remarks_on(document: Any, word: str) -> list[str]:
    return [text for text in document["remarks"] if word in text]


@pytest.fixture
def forged(orchard: Project, forger: Forger) -> Project:
    """A committed orchard with a forgery that the lock of the working tree names, as `vpstore lock` writes it."""
    commit(orchard)
    forger.replace_artifact("plant-sprout", forger.with_tensor)
    orchard.run("lock", "plant@sprout")
    assert told(found(orchard)) == [("lock", "plant@sprout: lock in git's HEAD")]
    return orchard


def without_git(project: Project) -> dict[str, str]:
    (project.cache / "bin").mkdir()
    return {"PATH": str(project.cache / "bin")}


def with_head(path: str, text: str) -> Callable[[Project], dict[str, str]]:
    """HEAD has something else under this path; the working tree stays as it is."""

    def change(project: Project) -> dict[str, str]:
        kept = (project.root / path).read_bytes()
        (project.root / path).write_text(text)
        commit(project)
        (project.root / path).write_bytes(kept)
        return {}

    return change


def in_git(path: str, text: str) -> Callable[[Project], dict[str, str]]:
    """A file of git's own says something else."""

    def change(project: Project) -> dict[str, str]:
        branch = git(project, "symbolic-ref", "HEAD").strip()
        (project.root / ".git" / path.format(branch=branch)).write_text(text)
        return {}

    return change


SILENCES: dict[str, tuple[Callable[[Project], dict[str, str]], str]] = {
    "another owner": (lambda project: {"GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"}, "git: detected dubious ownership"),
    "no git": (without_git, "git: it is not installed"),
    "no HEAD": (in_git("HEAD", "nothing\n"), "git: not a git repository"),
    "damaged branch": (in_git("{branch}", "nothing\n"), "git: ignoring broken ref"),
    "missing commit": (in_git("{branch}", f"{1:040}\n"), "git: not a tree object"),
    "unreadable lock": (with_head("vpstore.lock", "<<<<<<<\n"), "vpstore.lock in git's HEAD: "),
    "unreadable config": (with_head("pyproject.toml", "[tool\n"), "pyproject.toml in git's HEAD: "),
    "config of another program": (with_head("pyproject.toml", "[tool]\nvpstore = 1\n"), "pyproject.toml in git's HEAD"),
}


@pytest.mark.parametrize("name", ["GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR"])
def test_a_repository_that_git_was_told_of_is_not_asked(forged: Project, name: str, tmp_path: Path) -> None:
    """As in a hook of another repository, or of a linked worktree."""
    told_of = {name: str(tmp_path)}
    assert told(found(forged, **told_of)) == [("lock", "plant@sprout: lock in git's HEAD")]
    assert found(forged, **told_of)["commit"] == git(forged, "rev-parse", "HEAD").strip()


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if number % 3 == 0 else pytest.mark.slow) for number, case in enumerate(SILENCES)],
)
def test_where_git_cannot_say_what_is_committed_that_is_said(forged: Project, case: str) -> None:
    """The forgery and the lock agree, so the committed lock is the only witness."""
    silence, words = SILENCES[case]
    more = silence(forged)
    document = found(forged, code=0, **more)
    assert [text for text in document["remarks"] if "what is committed is not known" in text and words in text]
    for option in (*STRICT, "--signed"):
        faults = found(forged, option, **more)["faults"]
        (fault,) = [fault for fault in faults if fault["where"] == "git's HEAD"]
        assert fault["kind"] == "lock"
        assert fault["found"].startswith(words)
    (check,) = [row for row in forged.json("doctor", code=1, **more)["checks"] if row["name"] == "git"]
    assert not check["ok"]
    assert check["next_step"]
    assert case == "no git" or words in check["detail"]


def test_the_remedy_is_gits_own(forged: Project) -> None:
    (remark,) = remarks_on(found(forged, code=0, GIT_TEST_ASSUME_DIFFERENT_OWNER="1"), "dubious")
    assert remark.endswith(f"(git config --global --add safe.directory {forged.root.resolve()})")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_checkout_of_somebody_else_is_not_audited_without_its_anchor_unsaid(forged: Project, tmp_path: Path) -> None:
    shutil.copytree(forged.root, tmp_path / "theirs", symlinks=True)
    theirs = Project(tmp_path / "theirs", forged.cache)
    for path in (theirs.root, theirs.root / ".git"):
        os.chown(path, 4242, 4242)
    assert remarks_on(found(theirs, code=0, HOME=str(tmp_path)), "dubious ownership")
    assert ("lock", "git's HEAD") in told(found(theirs, "--worktree", HOME=str(tmp_path)))


def test_outside_git_nothing_vouches_for_the_lock_and_that_is_said(forged: Project) -> None:
    (forged.root / ".git").rename(forged.root / "elsewhere")
    document = found(forged, *STRICT, code=0)
    assert remarks_on(document, "not in a git repository")
    (check,) = [row for row in forged.json("doctor", code=0)["checks"] if row["name"] == "git"]
    assert check["ok"]
    assert "no git repository" in check["detail"]


@pytest.mark.parametrize("case", ["no commit", "no lock in it"])
def test_a_lock_that_was_never_committed_is_said_and_uncommitted(orchard: Project, case: str) -> None:
    git(orchard, "init", "-q")
    if case == "no lock in it":
        lock = (orchard.root / "vpstore.lock").read_bytes()
        (orchard.root / "vpstore.lock").unlink()
        commit(orchard)
        (orchard.root / "vpstore.lock").write_bytes(lock)
    (remark,) = remarks_on(found(orchard, "--locked", code=0), "vpstore.lock was never committed")
    assert "git commit" in remark
    assert ("stale", "vpstore.lock") in told(found(orchard, "--worktree"))
    commit(orchard)
    assert found(orchard, *STRICT, code=0)["remarks"] == []
    (check,) = [row for row in orchard.json("doctor", code=0)["checks"] if row["name"] == "git"]
    assert (check["ok"], check["detail"]) == (True, "HEAD has the lock")


def test_another_lock_file_is_held_against_the_committed_one(orchard: Project, forger: Forger) -> None:
    commit(orchard)
    forger.replace_artifact("plant-sprout", forger.with_tensor)
    shutil.copy(orchard.root / "vpstore.lock", orchard.root / "other.lock")
    pyproject = orchard.root / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace('"vpstore.lock"', '"other.lock"'))
    orchard.run("lock", "plant@sprout")
    assert told(found(orchard)) == [("lock", "plant@sprout: lock in git's HEAD")]
    document = found(orchard, "--other-machine", code=0)
    (remark,) = remarks_on(document, "[tool.vpstore]")
    assert "lock was vpstore.lock, is other.lock" in remark
    for option in STRICT:
        assert ("stale", "pyproject.toml: [tool.vpstore]: lock") in told(found(orchard, option))


def test_a_lock_that_was_moved_and_says_the_same_is_told(orchard: Project) -> None:
    commit(orchard)
    (orchard.root / "vpstore.lock").rename(orchard.root / "agreed.lock")
    pyproject = orchard.root / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace('"vpstore.lock"', '"agreed.lock"'))
    assert len(found(orchard, code=0)["remarks"]) == 1
    commit(orchard)
    assert found(orchard, *STRICT, code=0)["remarks"] == []


def under_another_profile(project: Project) -> None:
    """The same params, so the same keys."""
    shutil.copytree(project.root / "weights" / "tiny", project.root / "weights" / "large", symlinks=True)
    (project.root / "params.yaml").write_text("profile: large\n")


@pytest.mark.parametrize("is_locked", [True, False])
def test_another_profile_does_not_hide_a_forgery_under_a_committed_key(
    orchard: Project, forger: Forger, is_locked: bool
) -> None:
    commit(orchard)
    true = forger.artifact("plant-sprout")
    forger.replace_artifact("plant-sprout", forger.with_tensor)
    under_another_profile(orchard)
    if is_locked:
        orchard.run("lock", "seed", "plant@sprout")
    document = found(orchard)
    assert told(document) == [("lock", "plant@sprout: lock in git's HEAD, profile tiny")]
    assert document["faults"][0]["expected"] == true
    assert found(orchard, "--other-machine", code=0)["ok"]
    if is_locked:
        commit(orchard)  # then it was agreed
        assert found(orchard, *STRICT, code=0)["ok"]


def test_a_new_profile_with_the_true_artifacts_is_sound(orchard: Project) -> None:
    commit(orchard)
    under_another_profile(orchard)
    orchard.run("lock")
    assert "the last commit, whose lock names none" in remarks_on(found(orchard, "--locked", code=0), "plant@sprout")[0]


def signed(project: Project, *options: str, code: int = 3) -> Any:
    return project.json("audit", "seed", *options, code=code)


def other_key_under_the_name(project: Project) -> Path:
    (project.cache / "release.key.pem").rename(project.cache / "true.key.pem")
    return trust(project, "release")


def key_of_their_own(project: Project) -> Path:
    return trust(project, "mallory")


def folder_of_their_own(project: Project) -> Path:
    pyproject = project.root / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace('"keys"', '"mine"'))
    shutil.copytree(project.root / "keys", project.root / "mine")
    private = other_key_under_the_name(project)
    (project.root / "keys" / "release.pem").rename(project.root / "mine" / "release.pem")
    git(project, "checkout", "--", "keys")
    return private


def key_renamed(project: Project) -> Path:
    (project.root / "keys" / "release.pem").rename(project.root / "keys" / "chief.pem")
    return project.cache / "release.key.pem"


KEYS = {
    "foreign bytes": (other_key_under_the_name, "release", "has another key under this name"),
    "new file": (key_of_their_own, "mallory", "has no such key"),
    "another folder": (folder_of_their_own, "release", "has another key under this name"),
    "renamed": (key_renamed, "chief", "has no such key"),
}


@pytest.mark.parametrize("case", KEYS)
def test_a_key_that_is_not_the_committed_one_does_not_count(orchard: Project, case: str) -> None:
    pytest.importorskip("cryptography")
    trust(orchard, "release")
    commit(orchard)
    change, name, words = KEYS[case]
    orchard.run("attest", "seed", "--key", str(change(orchard)))
    document = signed(orchard, "--locked", code=0)
    assert document["chain"][-1]["signed_by"] == []
    assert [
        text for text in remarks_on(document, f"/{name}.pem: ") if words in text and "until it is committed" in text
    ]
    (fault,) = [fault for fault in signed(orchard, "--signed")["faults"] if fault["kind"] == "signature"]
    assert f"by {name}, but git's HEAD {words}" in fault["found"]
    assert "signed by" in (text := orchard.run("audit", "seed").stdout)
    assert f"signed by {name}, not as committed" in text
    assert [where for _, where in told(signed(orchard, "--worktree")) if f"/{name}.pem" in where]
    commit(orchard)  # whoever may commit may add a key
    assert signed(orchard, "--signed", *STRICT, code=0)["chain"][-1]["signed_by"] == [name]


def test_a_committed_key_that_is_gone_is_told(orchard: Project) -> None:
    pytest.importorskip("cryptography")
    key = trust(orchard, "release")
    trust(orchard, "second")
    commit(orchard)
    orchard.run("attest", "seed", "--key", str(key))
    (orchard.root / "keys" / "second.pem").unlink()
    document = signed(orchard, "--signed", "--locked", code=0)
    assert remarks_on(document, "keys/second.pem: git's HEAD has it, and it is not here")
    assert document["chain"][-1]["signed_by"] == ["release"]


def test_in_a_folder_of_a_larger_repository_the_anchors_are_signed(orchard: Project, tmp_path: Path) -> None:
    """And lines of a committed key that end otherwise are the same key."""
    pytest.importorskip("cryptography")
    key = trust(orchard, "release")
    orchard.run("attest", "seed", "--key", str(key))
    whole = Project(tmp_path / "whole", orchard.cache)
    shutil.copytree(orchard.root, whole.root / "part", symlinks=True)
    commit(whole)
    part = Project(whole.root / "part", orchard.cache)
    public = part.root / "keys" / "release.pem"
    public.write_bytes(public.read_bytes().replace(b"\n", b"\r\n"))
    assert signed(part, "--signed", *STRICT, code=0)["remarks"] == []
