"""Many processes at one store at once: publishers of the same and of other artifacts, readers, and gc all the while."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from shared_store import STAGES, Member, Team
from stage import Stage

from vpstore.schema.digest import Digest
from vpstore.storage.pointers import Pointer


def actor(member: Member, *commands: list[str], loop: bool = False, **more: str) -> dict[str, Any]:
    return {"cwd": member.root, "environment": member.variables(**more), "commands": list(commands), "loop": loop}


def perform(team: Team, stage: Stage, actors: list[dict[str, Any]]) -> str:
    """Run all at once; every one must succeed. What they said."""
    codes = stage.ask("crowd", actors=actors, log=str(team.folder / "crowd"))
    said = "".join(path.read_text() for path in sorted(team.folder.glob("crowd.*")))
    assert set(codes) == {0}, said
    return said


def scene(team: Team, *, groups: int, twins: int, readers: int, log: Path) -> tuple[list[Member], list[dict[str, Any]]]:
    """`groups` artifacts, each published by `twins` checkouts at once; readers of what was there before; verify; gc."""
    old = team.checkout("old")
    old.build()
    members, actors = [], []
    for group in range(groups):
        for twin in range(twins):
            member = team.checkout(f"c{group}-{twin}", sprout=10 + group, bloom=10 + group)
            members.append(member)
            actors.append(actor(member, ["build", *STAGES], SMALL_LOG=str(log)))
    actors += [actor(old, ["resolve", "plant", "--full"], ["resolve", "plant@sprout"], loop=True)] * readers
    actors.append(actor(old, ["verify", "--all"], loop=True))
    actors.append(actor(old, ["gc", "--grace", "0"], loop=True))
    return [old, *members], actors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("groups", "twins", "readers"),
    [
        (2, 4, 2),
        pytest.param(7, 4, 2, marks=pytest.mark.slow),  # 32 processes
        pytest.param(24, 4, 30, marks=pytest.mark.slow),
    ],
)
def test_a_crowd_loses_nothing(team: Team, stage: Stage, groups: int, twins: int, readers: int) -> None:
    log = team.folder / "recipes.log"
    members, actors = scene(team, groups=groups, twins=twins, readers=readers, log=log)
    assert len(actors) >= groups * twins + readers
    said = perform(team, stage, actors)
    assert "warning: a view was changed" not in said
    for member in members:
        for ref in STAGES:
            pointer = Pointer.decode(member.pointer(ref.replace("@", "-")).read_bytes(), where=ref)
            assert team.has(pointer.artifact)
            member.run("resolve", ref)
    runs = [line for line in log.read_text().splitlines() if line.startswith("small.grow")]
    assert len(runs) == len(set(runs)) * 2 == groups * 2  # sprout and bloom have equal params here: two runs a group
    assert list((team.root / "quarantine").iterdir()) == []
    assert [path for path in (team.root / "tmp").rglob("*") if path.is_file()] == []
    assert list((team.root / "work").iterdir()) == []
    assert list((team.root / "roots/running").iterdir()) == []
    members[0].verify()
    team.check_names()
    for key in {path.parent.name for path in team.store.keys.claims()}:
        assert len(team.store.keys.artifacts(Digest.from_hex(key))) == 1
    assert members[0].gc()["totals"]["goes"]["things"] == 0


def test_of_two_builders_of_one_key_one_builds_and_the_other_links(team: Team, stage: Stage) -> None:
    log = team.folder / "recipes.log"
    twins = [team.checkout(name) for name in ("ada", "bob")]
    twins[0].build("seed")
    twins[1].build("seed")
    said = perform(
        team,
        stage,
        [actor(member, ["build", "plant@sprout"], SMALL_LOG=str(log), SMALL_SLEEP="0.3") for member in twins],
    )
    assert len(log.read_text().splitlines()) == 1
    assert said.count("another process builds it; waiting") == 1
    assert said.count("cache hit") == 1
    for member in twins:
        member.run("resolve", "plant@sprout", "--full")


def test_whoever_waits_takes_over_from_a_builder_that_was_killed(team: Team, stage: Stage) -> None:
    """The recipe kills its own process the first time; the waiting one finds the lock free and what was computed."""
    twins = [team.checkout(name) for name in ("ada", "bob")]
    fallen = team.folder / "fallen"
    for member in twins:
        member.build("seed")
        recipe = member.root / "small/grow.py"
        code = f"""    if not os.path.exists({str(fallen)!r}):
        open({str(fallen)!r}, "w").close()
        while not os.path.exists({str(team.folder / "waits")!r}):
            time.sleep(0.01)
        os.kill(os.getpid(), 9)
    step = prepared"""
        recipe.write_text(recipe.read_text().replace("    step = prepared", code))
    actors = [actor(member, ["build", "plant@sprout"]) for member in twins]
    codes = stage.ask(
        "crowd", actors=actors, log=str(team.folder / "crowd"), touch_when_waiting=str(team.folder / "waits")
    )
    assert sorted(codes) == [0, 1]
    survivor = twins[codes.index(0)]
    said = (team.folder / f"crowd.{codes.index(0)}").read_text()
    assert "another process builds it; waiting" in said
    survivor.run("resolve", "plant@sprout", "--full")
    assert list((team.root / "work").iterdir()) == []
