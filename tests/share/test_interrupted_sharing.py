"""Transfers that are killed or interrupted are taken up; several at once do not disturb one another."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from sharing_server import SIGNAL
from small_project import Project
from two_checkouts import Pair, artifact_of, configure, copy_of, fresh_clone, named_by_remote, objects, store_of

from vpstore.errors import BadManifest
from vpstore.schema.manifest import Manifest

STRIDE = 23  # calls that change a disk between two kills; a publication of one blob takes five or six


def attempt(project: Project, verb: str, number: int, at: int) -> int:
    """Run a command that gets a signal at the N-th call; its exit code."""
    try:
        project.run(verb, "-j", "3", **{SIGNAL: f"{at}:{number}"})
    except AssertionError as error:
        return int(str(error).split("exit ")[1].split("\n")[0])
    return 0


def until_done(project: Project, verb: str, *, check: Callable[[], None]) -> int:
    """Kill a command again and again, each time a little later, until one run gets through; how many it took."""
    for count in range(60):
        code = attempt(project, verb, signal.SIGKILL, STRIDE + 5 * count)
        check()
        if code == 0:
            return count + 1
        assert code == -signal.SIGKILL
    raise AssertionError("it does not converge")


def stamps(remote: Path) -> dict[str, tuple[int, int]]:
    files = {name: (remote / name).stat() for name in objects(remote)}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in files.items()}


def test_a_push_that_is_killed_again_and_again_converges(pair: Pair) -> None:
    whole = pair.objects()
    configure(pair.a, pair.folder / "other")
    remote = pair.folder / "other" / "vpstore"
    seen: dict[str, tuple[int, int]] = {}

    def check() -> None:
        assert named_by_remote(remote) == []
        now = stamps(remote)
        assert seen.items() <= now.items()  # what was moved is not moved again
        seen.update(now)

    assert until_done(pair.a, "push", check=check) > 4
    assert objects(remote) == whole
    assert pair.a.json("push")["objects_moved"] == 0


def named_by_store(project: Project) -> list[str]:
    """What a store names and does not have whole."""
    if not (project.store / "format").exists():
        return []
    store = store_of(project)
    faults = [f"{digest} is damaged" for digest in store.blobs.all() if not store.blobs.is_whole(digest, full=True)]
    for digest in store.blobs.all():
        try:
            manifest = Manifest.decode(store.blobs.path(digest).read_bytes(), where="")
        except BadManifest:
            continue
        faults += [f"{digest} lacks {part}" for part in manifest.blobs() if not store.blobs.has(part)]
    faults += [str(path) for path in store.keys.all() if not store.blobs.has(store.keys.read(path)[1])]
    for artifact in store.attestations.artifacts():
        if not store.blobs.has(artifact) and list(store.attestations.paths(artifact)):
            faults.append(f"{artifact} is attested and not here")
    return faults


@pytest.mark.slow
def test_a_pull_that_is_killed_again_and_again_converges(pair: Pair) -> None:
    seen: dict[Path, int] = {}

    def check() -> None:
        assert named_by_store(pair.b) == []
        now = {path: path.stat().st_ino for path in (pair.b.store / "blobs").rglob("*") if path.is_file()}
        assert seen.items() <= now.items()
        seen.update(now)
        for slug in ("plant-bloom", "seed-main"):
            if pair.b.pointer(slug).exists():
                pair.b.run("resolve", slug.replace("-", "@"))

    assert until_done(pair.b, "pull", check=check) > 4
    assert pair.b.json("verify", "--all")["ok"]
    assert pair.b.json("pull")["objects_moved"] == 0
    assert not list((pair.b.store / "tmp" / "partial").iterdir())


@pytest.mark.parametrize("verb", ["push", "pull"])
def test_ctrl_c_leaves_with_130_and_what_moved_stays(pair: Pair, verb: str) -> None:
    project = pair.b
    if verb == "push":
        project = pair.a
        configure(project, pair.folder / "other")
    assert attempt(project, verb, signal.SIGINT, 90) == 130
    assert "Traceback" not in (project.cache / "output" / "stderr").read_text()
    assert "interrupted" in (project.cache / "output" / "stderr").read_text()
    assert named_by_store(pair.b) == []
    assert not list((project.store / "roots" / "running").glob("*.json"))
    done = project.json(verb)
    assert done["objects_moved"] > 0
    assert done["objects_present"] > 0
    assert project.json(verb)["objects_moved"] == 0


def together(*runs: tuple[Project, str, dict[str, str]]) -> None:
    """Run commands at the same time, each in a process of its own."""
    started = [
        subprocess.Popen(
            project.command(verb), cwd=project.root, env=project.variables(**more), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for project, verb, more in runs
    ]  # fmt: skip
    for process in started:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, out + err


def test_two_push_and_two_pull_at_once(pair: Pair) -> None:
    whole = pair.objects()
    (pair.folder / "second").mkdir()
    twin = copy_of(pair, pair.folder / "second")
    for project in (pair.a, twin):
        configure(project, pair.folder / "other")
    together((pair.a, "push", {}), (twin, "push", {}))
    remote = pair.folder / "other" / "vpstore"
    assert objects(remote) == whole
    assert named_by_remote(remote) == []
    shared = {"VPSTORE_ROOT": str(pair.folder / "store")}
    c = fresh_clone(pair.a, pair.folder / "c")
    configure(pair.b, pair.folder / "other")
    together((pair.b, "pull", shared), (c, "pull", shared))
    for project in (pair.b, c):
        assert project.json("verify", "--all", **shared)["ok"]
        assert project.json("resolve", "plant", **shared)["artifact"] == artifact_of(pair.a, "plant@bloom")
    assert not os.listdir(pair.folder / "store" / "tmp" / "partial")
