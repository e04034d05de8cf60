"""Grace, damage, and what lies in a store beside artifacts."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
from shared_store import Member, Team, reasons
from test_gc_roots import move_on

from vpstore.api.keeping import duration
from vpstore.collecting import marking
from vpstore.errors import UsageError
from vpstore.schema.digest import Digest
from vpstore.storage import leftovers
from vpstore.storage.leftovers import Clock

DAY = 86400.0


@pytest.fixture
def ada(team: Team) -> Member:
    return team.checkout("ada")


def wait_until(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let gc take it for so much later."""
    from vpstore.verbs import gc

    now = gc.time.time()
    monkeypatch.setattr(gc.time, "time", lambda: now + seconds)


def test_what_is_younger_than_the_grace_period_stays(team: Team, ada: Member, monkeypatch: pytest.MonkeyPatch) -> None:
    before, _ = move_on(ada)
    document = ada.json("gc")  # a day
    assert document["grace_seconds"] == DAY
    assert reasons(document)[before] == (
        False,
        f"manifest of plant@bloom {before[7:19]}: younger than the grace period",
    )
    wait_until(monkeypatch, DAY - 60)
    ada.collect(grace=DAY)
    assert team.has(before)
    wait_until(monkeypatch, 120)  # added up, a minute over the day
    ada.collect(grace=DAY)
    assert not team.has(before)
    team.check_names()


def test_a_young_artifact_keeps_the_old_blobs_that_it_needs(
    team: Team, ada: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest that is kept for its youth while an old blob of it goes would be a name that leads nowhere."""
    before, _ = move_on(ada)
    manifest = team.store.blobs.path(Digest(before))
    changed = leftovers.changed
    monkeypatch.setattr(leftovers, "changed", lambda path: changed(path) - (0 if path == manifest else 2 * DAY))
    ada.collect(grace=DAY)
    assert team.has(before)
    team.check_names()
    monkeypatch.setattr(marking, "_of_youth", lambda store, marks, clock: iter(()))
    ada.collect(grace=DAY)  # the control: only the manifest itself is young
    assert not team.has(before)


def test_age_is_by_ctime(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    os.utime(file, (0, 0))
    now = file.stat().st_ctime
    assert Clock(now + 5, 10).is_young(file)
    assert not Clock(now + 15, 10).is_young(file)
    os.utime(file, (now + 1000, now + 1000))
    assert not Clock(file.stat().st_ctime + 15, 10).is_young(file)
    assert not Clock(now - 100, 0).is_young(file)  # no grace: even what a wrong clock dates to the future


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("90s", 90), ("30m", 1800), ("12h", 43200), ("1d", DAY), ("2w", 14 * DAY), ("1.5d", 129600)],
)
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "-1d", "1", "1y", "d", "1 d", "1e3s", "nan", "9999999999d"])
def test_bad_durations_are_refused(ada: Member, text: str) -> None:
    with pytest.raises(UsageError):
        duration(text)
    ada.build("seed")
    assert "Traceback" not in ada.run("gc", f"--grace={text}", code=2).stderr


def damaged(team: Team, digest: str) -> Path:
    path = team.store.blobs.path(Digest(digest))
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    return path


def test_a_pointer_that_hides_what_is_needed_is_built_anew(team: Team, ada: Member) -> None:
    """Nothing of this checkout was ever recorded, as in a store whose roots were not copied along."""
    ada.build()
    for record in (team.root / "roots").glob("*.json"):
        record.unlink()
    ada.pointer("plant-bloom").write_text("{}")
    error = ada.gc(code=14)["error"]
    assert "plant-bloom.json" in error["where"]
    assert error["next_step"].startswith("vpstore build plant@bloom;")
    assert "(vpstore build plant@bloom)" in ada.run("gc", "--dry-run", "--grace", "0", code=14).stdout
    ada.run("build", "plant@bloom")
    ada.gc()


@pytest.mark.parametrize("ref", ["plant@bloom", "seed@main"])
@pytest.mark.parametrize("is_lost", [False, True])
def test_a_damaged_manifest_that_is_needed_stops_gc(team: Team, ada: Member, ref: str, is_lost: bool) -> None:
    """Also of an ancestor that only the manifests of its children name."""
    old, _ = move_on(ada)
    artifacts = ada.build()
    for parent in ("seed@main", "plant@sprout"):
        ada.drop(parent, "pointer", "view")
    path = damaged(team, artifacts[ref])
    if is_lost:
        path.unlink()
    before = team.blobs()
    error = ada.gc(code=14)["error"]
    assert artifacts[ref] in error["where"]
    assert "vpstore repair" in error["next_step"]
    assert team.blobs() == before
    document = ada.gc("--dry-run", code=14)
    assert not document["ok"]
    assert reasons(document)[old] == (False, f"may be needed: {document['obstacles'][0]}")
    assert document["totals"]["goes"]["things"] == 0
    text = ada.run("gc", "--dry-run", "--grace", "0", code=14)
    assert "DAMAGE" in text.stdout
    ada.gc("--despite-damage")
    assert not team.store.blobs.has(Digest(old))
    assert is_lost or path.exists()  # the damaged manifest itself stays: it can still be looked at


def test_damage_in_what_nobody_needs_stops_nothing(team: Team, ada: Member) -> None:
    old, new = move_on(ada)
    damaged(team, old)
    ada.json("gc")  # kept for its youth
    ada.gc()
    assert not team.store.blobs.has(Digest(old))
    assert team.has(new)
    team.check_names()


def test_leftovers_go_when_they_are_old_and_nobodys(team: Team, ada: Member, monkeypatch: pytest.MonkeyPatch) -> None:
    ada.build("seed")
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    key = Digest.of(b"a key")
    files = {
        "temporary": team.root / f"tmp/{dead}-0123456789abcdef",
        "download": team.root / "tmp/partial" / key.hex,
        "scratch": team.root / "work" / key.hex / "state/step",
        "quarantine": team.root / "quarantine" / f"{key.hex}-1-2",
    }
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")
    document = ada.json("gc")
    assert all(
        why == "younger than the grace period" for _, why in things(document, *files).values() if "kept" not in why
    )
    assert all(path.exists() for path in files.values())
    with team.store.locks.exclusive(key.hex), files["download"].open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        document = ada.gc()
    assert things(document, *files) == {
        "temporary": (True, "left by a process that ended"),
        "download": (False, "a process is at work on it"),
        "scratch": (False, "a process is at work on it"),
        "quarantine": (False, "kept aside until --quarantine"),
    }
    assert [path.exists() for path in files.values()] == [False, True, True, True]
    ada.gc()
    assert [path.exists() for path in files.values()] == [False, False, False, True]
    assert not files["scratch"].parents[1].exists()
    young = things(ada.json("gc", "--quarantine"), "quarantine")
    assert young == {"quarantine": (False, "younger than the grace period")}
    assert files["quarantine"].exists()
    assert things(ada.gc("--quarantine"), "quarantine") == {"quarantine": (True, "was kept aside")}
    assert not files["quarantine"].exists()


def things(document: Any, *kinds: str) -> dict[str, tuple[bool, str]]:
    return {row["kind"]: (row["goes"], row["why"]) for row in document["things"] if row["kind"] in kinds}


def test_a_temporary_file_of_a_living_process_stays(team: Team, ada: Member) -> None:
    from vpstore.storage.atomic import TemporaryFile

    ada.build("seed")
    with TemporaryFile(team.root / "tmp") as out:
        out.write(b"x")
        foreign = out.path.with_name("4194305-0123456789abcdef")  # no such pid here: as if another host wrote it
        out.path.rename(foreign)
        found = reasons(ada.gc(), "temporary")
        assert found == {f"tmp/{foreign.name}": (False, "a process is at work on it")}
        foreign.rename(out.path)
    assert reasons(ada.gc(), "temporary") == {}


def test_foreign_files_among_the_blobs_stay(team: Team, ada: Member) -> None:
    ada.build("seed")
    strays = [team.root / "blobs/blake3/notes.txt", team.root / "blobs/blake3/ab" / ("g" * 62)]
    for path in strays:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    document = ada.gc()
    assert len(reasons(document, "stray")) == 2
    assert all(path.exists() for path in strays)


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(
    team: Team, ada: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the roots cannot be listed, nothing may be taken for unneeded."""
    ada.build()
    other = team.checkout("other")
    listdir = os.listdir

    def refuse(path: Any = ".") -> list[str]:
        if Path(path) == team.root / "roots":
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    work = other.work()
    before = team.blobs()
    with monkeypatch.context() as broken:
        broken.setattr(os, "listdir", refuse)
        from vpstore.collecting.judging import Terms
        from vpstore.errors import VpstoreError
        from vpstore.verbs.gc import collect

        with pytest.raises(VpstoreError, match="Permission denied"):
            collect(work, Terms(grace_seconds=0))
    assert team.blobs() == before


def test_a_summary_of_many_blobs_is_short(team: Team, ada: Member) -> None:
    ada.build("seed")
    for number in range(300):
        team.store.blobs.put_bytes(b"loose %d" % number)
    text = ada.run("gc", "--grace", "0").stdout
    assert "gone         300 blobs" in text
    assert len(text.splitlines()) < 15
    for number in range(3):
        team.store.blobs.put_bytes(b"loose %d" % number)
    assert ada.run("gc", "--grace", "0", "--verbose").stdout.count("no root leads to it") == 4


def test_doctor_says_what_lies_about_and_what_a_group_needs(
    team: Team, ada: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vpstore.verbs import doctor

    ada.build("seed")
    checks = {row["name"]: row for row in ada.json("doctor")["checks"]}
    assert checks["leftovers"]["detail"] == "none"
    assert checks["sharing"]["ok"]
    (team.root / "quarantine/damaged").write_bytes(b"123")
    (team.root / "work/old").mkdir()
    (team.root / "work/old/state").write_bytes(b"1234")
    checks = {row["name"]: row for row in ada.json("doctor")["checks"]}
    assert checks["leftovers"]["detail"] == "1 damaged blobs in quarantine, 3 bytes"
    now = doctor.time.time()
    monkeypatch.setattr(doctor.time, "time", lambda: now + 8 * DAY)
    monkeypatch.chdir(ada.root)
    found = {row.name: row for row in doctor.examine(ada.root, profile=None).checks}
    assert not found["leftovers"].ok
    assert "1 older than a week, 4 bytes" in found["leftovers"].detail
    assert "vpstore gc" in found["leftovers"].next_step
    team.root.chmod(0o775)
    assert "chmod g+s" in doctor._sharing(team.root)[2]
    team.root.chmod(0o2775)
    before = os.umask(0o022)
    try:
        assert not doctor._sharing(team.root)[0]
        os.umask(0o002)
        assert doctor._sharing(team.root)[0]
    finally:
        os.umask(before)
