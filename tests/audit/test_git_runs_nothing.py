"""What a checkout's own git configuration names is not run by a question about the checkout."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from vpstore.repository import git_environment, has_link
from vpstore.surroundings import git_state

IDENTITY = ("-c", "user.name=a", "-c", "user.email=a@b")


def git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(root), *IDENTITY, *arguments], check=True, capture_output=True)


@pytest.fixture
def armed(tmp_path: Path) -> tuple[Path, Path]:
    """A repository whose configuration names a program for whatever it can, and the file that the program makes."""
    root, mark, program = tmp_path / "clone", tmp_path / "ran", tmp_path / "program.sh"
    program.write_text(f"#!/bin/sh\necho ran >> {mark}\nexit 1\n")
    program.chmod(0o755)
    root.mkdir()
    git(root, "init", "-q")
    (root / "pyproject.toml").write_text("")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "one")
    for name in ("core.fsmonitor", "core.pager", "core.sshCommand", "remote.origin.uploadpack"):
        git(root, "config", name, str(program))
    git(root, "config", "remote.origin.url", str(tmp_path / "elsewhere"))
    git(root, "config", "extensions.partialClone", "origin")
    mark.unlink(missing_ok=True)
    return root, mark


def test_no_program_of_the_configuration_runs(armed: tuple[Path, Path]) -> None:
    root, mark = armed
    assert git_state(root)["commit"] not in (None, "unknown")
    assert has_link(root, "pyproject.toml") is False
    (root / ".git/objects").joinpath("pack").mkdir(exist_ok=True)
    absent = ["git", "-C", str(root), "cat-file", "-p", "1" * 40]
    assert subprocess.run(absent, env=git_environment(), capture_output=True).returncode != 0
    assert not mark.exists()


def test_git_by_itself_would_run_one(armed: tuple[Path, Path]) -> None:
    root, mark = armed
    subprocess.run(["git", "-C", str(root), "status"], capture_output=True)
    assert mark.exists()


def test_what_a_person_says_of_every_repository_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "safe.directory")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "*")
    said = git_environment()
    count = int(said["GIT_CONFIG_COUNT"])
    keys = [said[f"GIT_CONFIG_KEY_{number}"] for number in range(count)]
    assert keys[0] == "safe.directory"
    assert {"core.fsmonitor", "protocol.allow"} <= set(keys)
