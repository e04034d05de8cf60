"""The lock, staleness and profiles: what a checkout has against what was agreed."""

from __future__ import annotations

import shutil
from pathlib import Path

from small_project import Project


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def test_of_several_results_the_locked_one_is_taken(built: Project) -> None:
    artifacts = [built.json("resolve", "plant")["artifact"]]
    for _ in range(3):
        artifacts.append(built.json("build", "plant", "--force", SMALL_NOISE="1")["builds"][0]["artifact"])
    assert len(set(artifacts)) == 4
    built.run("lock", "plant")
    built.run("build", "plant", "--force", SMALL_NOISE="1")
    assert built.json("build", "plant")["builds"][0]["artifact"] == artifacts[-1]


def test_the_lock_is_compared_with_and_only_lock_changes_it(built: Project) -> None:
    lock = built.root / "vpstore.lock"
    assert {row["locked"] for row in built.json("ls")["objects"]} == {"absent"}
    built.run("resolve", "plant", "--locked", code=15)
    built.run("lock", "--dry-run")
    assert not lock.exists()
    assert {row["change"] for row in built.json("lock")["changes"]} == {"added"}
    agreed = lock.read_bytes()
    assert {row["change"] for row in built.json("lock")["changes"]} == {"kept"}
    assert lock.read_bytes() == agreed
    built.run("resolve", "plant", "--locked")
    assert "identical to vpstore.lock" in built.run("build", "plant").stdout

    config = built.root / "configs" / "plant.toml"
    config.write_text(config.read_text().replace("step = 2", "step = 3"))
    done = built.run("build", "plant")
    assert "differs from vpstore.lock (other params) in 1 of 3 tensors" in done.stdout
    assert "body" in done.stdout
    assert lock.read_bytes() == agreed
    warned = built.run("resolve", "plant")
    assert "the lock says" in warned.stderr
    built.run("resolve", "plant", "--locked", code=15)
    assert {row["locked"] for row in built.json("ls")["objects"]} == {"same", "differs"}
    assert [row["change"] for row in built.json("lock", "plant")["changes"]] == ["changed"]
    built.run("resolve", "plant", "--locked")


def test_lock_check_finds_a_forgotten_lock(built: Project) -> None:
    built.run("lock", "--check", code=15)
    built.run("lock")
    built.run("lock", "--check")
    append(built.root / "small" / "soil.py", "\n# a comment\n")
    built.run("lock", "--check")
    append(built.root / "small" / "soil.py", "more = 1\n")
    faults = built.json("lock", "--check", code=15)["faults"]
    assert {(row["ref"], row["part"]) for row in faults} >= {("plant@bloom", "code"), ("seed@main", "code")}


def test_without_a_pointer_the_lock_says_which_artifact(built: Project) -> None:
    built.run("lock")
    path = built.run("resolve", "plant").stdout
    shutil.rmtree(built.root / "weights")
    assert built.run("resolve", "plant").stdout == path


def test_what_is_stale_is_said_on_stderr(built: Project) -> None:
    config = built.root / "configs" / "plant.toml"
    config.write_text(config.read_text().replace("step = 2", "step = 3"))
    done = built.run("resolve", "plant")
    assert "plant@bloom is stale" in done.stderr
    assert "params: step" in done.stderr
    append(built.root / "small" / "grow.py", "more = 1\n")
    assert "code: small/grow.py" in built.run("resolve", "plant").stderr
    built.run("build", "plant@sprout")  # another history of the same content
    assert "input parent" not in built.run("resolve", "plant").stderr
    config.write_text(config.read_text().replace("step = 1", "step = 5"))
    built.run("build", "plant@sprout")
    assert "input parent" in built.run("resolve", "plant").stderr


def test_profiles_have_weights_and_locks_of_their_own(built: Project) -> None:
    built.run("resolve", "plant", "--profile", "large", code=11)
    built.run("build", "--all", "--profile", "large")
    assert built.pointer("plant-bloom", "large").read_bytes() == built.pointer("plant-bloom").read_bytes()
    built.run("lock", VPSTORE_PROFILE="large")
    built.run("resolve", "plant", "--locked", VPSTORE_PROFILE="large")
    built.run("resolve", "plant", "--locked", code=15)
    built.run("ls", "--profile", "nothing", code=2)
