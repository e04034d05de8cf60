"""gc at every point of everything else: stopped before each call that changes the disk, with gc in between."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shared_store import STAGES, Member, Team, remove
from stage import Stage

from vpstore.schema.digest import Digest


class Replay:
    """The same beginning again and again, at the same path, as the store records where a checkout is."""

    def __init__(self, team: Team, member: Member, stage: Stage) -> None:
        self.team, self.member, self.stage = team, member, stage
        self.saved = team.folder / "saved"
        self.saved.mkdir()
        for name in ("store", member.root.name):
            shutil.copytree(team.folder / name, self.saved / name, symlinks=True)

    def restore(self) -> None:
        for name in ("store", self.member.root.name):
            remove(self.team.folder / name)
            shutil.copytree(self.saved / name, self.team.folder / name, symlinks=True)

    def interleave(self, *arguments: str, stop: int, **rest: Any) -> Any:
        log = str(self.team.folder / "log")
        for path in self.team.folder.glob("log.*"):
            path.unlink()
        fields = {"cwd": self.member.root, "environment": self.member.variables(), "log": log}
        found = self.stage.ask("interleave", arguments=arguments, stop=stop, **fields, **rest)
        found["log"] = "".join(path.read_text() for path in sorted(self.team.folder.glob("log.*")))
        return found


def everywhere(replay: Replay, *arguments: str, check: Callable[[], None], step: int = 1) -> tuple[int, int]:
    """Stop a command before each of its disk calls; how many there were, and at how many gc had to wait."""
    stop, waited = 1, 0
    while True:
        replay.restore()
        found = replay.interleave(*arguments, stop=stop)
        where = f"before call {stop}, {found['where']}:\n{found['log']}"
        assert (found["actor"], found["gc"]) == (0, 0), where
        check()
        replay.team.check_names()
        if not found["where"]:
            return stop - 1, waited
        waited += found["gc_waited"]
        stop += step


def whole(team: Team, member: Member, *refs: str) -> Callable[[], None]:
    """A check that what the pointers name is here, with views that show it."""

    def check() -> None:
        for ref in refs:
            artifact = member.pointed(ref.replace("@", "-"))["artifact"]
            assert team.has(artifact), ref
            view = member.root / "weights/tiny" / f"{ref}-{artifact[7:19]}"
            assert all(path.exists() for path in view.rglob("*")), ref  # no link leads nowhere

    return check


@pytest.fixture
def ada(team: Team) -> Member:
    made = team.checkout("ada")
    made.build()
    return made


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_publish_loses_nothing_wherever_gc_runs(team: Team, ada: Member, stage: Stage, step: int) -> None:
    ada.set_steps(bloom=3)
    replay = Replay(team, ada, stage)
    calls, waited = everywhere(replay, "build", "plant@bloom", check=whole(team, ada, *STAGES), step=step)
    assert calls > 60
    assert 0 < waited < calls / step  # while it computes, gc does not have to wait


@pytest.mark.slow
def test_a_small_publish_into_an_empty_store_loses_nothing_at_any_call(team: Team, stage: Stage) -> None:
    """The first build of a new checkout: nothing leads to anything yet."""
    bob = team.checkout("bob")
    bob.build("seed")
    remove(bob.root / "weights")
    bob.run("gc", "--grace", "0", "--forget", str(bob.root))
    assert team.blobs() == set()
    replay = Replay(team, bob, stage)
    calls, _ = everywhere(replay, "build", "seed", check=whole(team, bob, "seed@main"))
    assert calls > 40


@pytest.mark.slow
def test_a_cache_hit_loses_nothing(team: Team, ada: Member, stage: Stage) -> None:
    """Pointer and view are gone, the artifact is there and rootless: the hit must find all of it or build it anew."""
    ada.drop("plant@bloom", "pointer", "view")
    replay = Replay(team, ada, stage)
    calls, waited = everywhere(replay, "build", "plant@bloom", check=whole(team, ada, *STAGES))
    assert calls > 5
    assert waited > 0


def test_a_lock_entry_leads_to_bytes(team: Team, ada: Member, stage: Stage) -> None:
    """The pointer goes as soon as the lock is written: from then on only the lock holds the artifact."""
    for path in (team.root / "roots").glob("*.json"):
        path.unlink()  # as if the checkout had been made by hand
    ada.run("gc", "--dry-run")
    bob = team.checkout("bob")
    shutil.copytree(ada.root / "weights/tiny/refs", bob.root / "weights/tiny/refs")
    shutil.rmtree(ada.root)
    replay = Replay(team, bob, stage)
    carol = team.checkout("carol")  # whose gc knows nothing of bob until he registers

    def check() -> None:
        from vpstore.schema.lockfile import Lockfile

        entries = Lockfile.decode((bob.root / "vpstore.lock").read_bytes(), where="").profiles["tiny"].values()
        assert [entry.artifact for entry in entries if not team.has(entry.artifact)] == []

    for stop in range(1, 40):
        replay.restore()
        found = replay.interleave("lock", stop=stop, **{"from": str(carol.root)})
        assert found["actor"] == 0, found["log"]
        check()
        if not found["where"]:
            break
    assert stop > 5


def test_a_view_of_an_artifact_that_no_root_leads_to(team: Team, ada: Member, stage: Stage) -> None:
    """object#digest resolves to bytes that are there when the path is printed, and stay."""
    artifact = ada.build()["plant@bloom"]
    ada.drop("plant@bloom", "pointer", "view")
    replay = Replay(team, ada, stage)
    shown, stop = 0, 1
    while True:
        replay.restore()
        found = replay.interleave("resolve", f"plant#{artifact[7:27]}", stop=stop)
        if found["actor"] == 0:
            shown += 1
            assert team.has(artifact)
            view = ada.root / "weights/tiny" / f"plant@bloom-{artifact[7:19]}"
            assert all(path.exists() for path in view.rglob("*"))
        else:
            assert found["actor"] in (11, 12), found["log"]  # collected before: no such artifact, in so many words
            assert "Traceback" not in found["log"]
        if not found["where"]:
            break
        stop += 1
    assert shown > 5


def test_control_without_the_lock_of_the_store_a_publish_loses_blobs(team: Team, ada: Member, stage: Stage) -> None:
    ada.set_steps(bloom=3)
    replay = Replay(team, ada, stage)
    lost, stop = 0, 1
    while lost == 0:
        replay.restore()
        found = replay.interleave("build", "plant@bloom", stop=stop, control="no lock of the store")
        assert found["where"], "nothing was ever lost"
        try:
            assert found["actor"] == 0
            whole(team, ada, "plant@bloom")()
            team.check_names()
        except (AssertionError, OSError, StopIteration):
            lost += 1
        stop += 5


@pytest.mark.parametrize("control", ["", "no running roots"])
def test_a_build_keeps_its_parents_while_it_runs(team: Team, ada: Member, stage: Stage, control: str) -> None:
    """Even if pointers and views of them go and gc runs meanwhile; the recipe itself does that here."""
    ada.set_steps(bloom=3)
    recipe = ada.root / "small/grow.py"
    code = """    import shutil, subprocess, sys
    from pathlib import Path
    for path in sorted(Path("ROOT/weights/tiny").glob("*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    subprocess.run([sys.executable, "-m", "vpstore", "gc", "--grace", "0"], check=True, cwd="ROOT")
    return Staged(""".replace("ROOT", str(ada.root))
    recipe.write_text(recipe.read_text().replace("    return Staged(", code))
    replay = Replay(team, ada, stage)
    found = replay.interleave("build", "plant@bloom", stop=0, control=control)
    artifact = ada.pointed("plant-bloom")["artifact"]
    assert found["actor"] == 0, found["log"]
    assert team.has(artifact) == (not control)


def test_a_root_appears_only_while_nobody_sweeps(team: Team, ada: Member) -> None:
    """What is found after registering stays: registration waits for a sweep, and a sweep for it."""
    import multiprocessing

    store = team.store
    artifact = Digest.of(b"anything")
    for register in ("running", "hold"):
        parent, child = multiprocessing.Pipe()

        def act(register: str = register, child: Any = child) -> None:
            if register == "running":
                with store.roots.running(artifacts=[artifact]):
                    child.send("registered")
            else:
                store.roots.hold(ada.root, "tiny/any@thing", artifact)
                child.send("registered")

        process = multiprocessing.get_context("fork").Process(target=act)
        with store.sweeping():
            process.start()
            before = (store.roots.at_work(), store.roots.checkouts())
            assert not parent.poll(0.2)
            assert (store.roots.at_work(), store.roots.checkouts()) == before
        assert parent.poll(20)
        process.join(20)


def killed_everywhere(team: Team, member: Member, stage: Stage, step: int) -> tuple[int, dict[str, bytes]]:
    """gc killed before each of its disk calls: no name leads to missing bytes; a retry ends as a run without a kill."""
    replay = Replay(team, member, stage)
    fields = {"cwd": member.root, "environment": member.variables(), "log": str(team.folder / "log.gc")}
    arguments = ["gc", "--grace", "0", "--quarantine"]
    found = stage.ask("kill", arguments=arguments, at=0, **fields)
    assert found["code"] == 0, (team.folder / "log.gc").read_text()
    end = listing(team.root)
    for at in range(1, found["calls"] + 1, step):
        replay.restore()
        assert stage.ask("kill", arguments=arguments, at=at, **fields)["code"] == -9
        team.check_names()
        whole(team, member, *STAGES)()
        retry = stage.ask("kill", arguments=arguments, at=0, **fields)
        assert retry["code"] == 0, (team.folder / "log.gc").read_text()
        assert listing(team.root) == end, at
    return found["calls"], end


def listing(root: Path) -> dict[str, bytes]:
    """Every file and folder of a store but locks and empty fan-out folders."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else b""
        for path in root.rglob("*")
        if "locks" not in path.parts and not (path.is_dir() and len(path.name) == 2)
    }


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_gc_leaves_no_name_that_leads_nowhere(team: Team, ada: Member, stage: Stage, step: int) -> None:
    for bloom in (5, 6):
        ada.set_steps(sprout=bloom, bloom=bloom)
        ada.build("plant@sprout", *(["plant@bloom"] if bloom == 5 else []))
    ada.set_steps()
    ada.build()
    for view in (ada.root / "weights/tiny").glob("plant@*-*"):
        remove(view)
    for ref in ("plant", "plant@sprout"):
        ada.run("resolve", ref)
    scratch = team.root / "work" / ("ab" * 32)
    (scratch / "deep").mkdir(parents=True)
    (scratch / "deep/state").write_bytes(b"x")
    (team.root / "quarantine" / "damaged").write_bytes(b"x")
    calls, end = killed_everywhere(team, ada, stage, step)
    assert calls > 40
    assert not any(name.startswith(("work/", "quarantine/", "tmp/")) for name in end)


def test_control_another_order_leaves_names_that_lead_nowhere(
    team: Team, ada: Member, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blobs before keys: the check of the test above must notice."""
    from vpstore.verbs import gc

    ada.set_steps(bloom=5)
    ada.build()
    ada.drop("plant@bloom", "pointer", "view")
    remove_all, seen = gc._remove_all, []

    def only_blobs(paths: list[Path], **rest: Any) -> None:
        seen.append(len(paths))
        if not rest:
            remove_all(paths, **rest)

    monkeypatch.setattr(gc, "_remove_all", only_blobs)
    ada.collect()
    assert sum(seen) > 4
    with pytest.raises(AssertionError):
        team.check_names()
