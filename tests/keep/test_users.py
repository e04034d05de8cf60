"""One store, several people: with a group and umask 002 all works for both; with umask 077 nobody else reads it."""

from __future__ import annotations

import atexit
import os
import re
import stat
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from people import GROUP, REPOSITORY, Commands, PeopleServer, change_to, in_fork
from shared_store import STAGES, Member, Team, remove

from vpstore.checkout import Checkout
from vpstore.schema.digest import Digest
from vpstore.sharing.naming import agreed, built_here
from vpstore.storage.remotes.directory import DirectoryRemote
from vpstore.storage.stamps import Stamps
from vpstore.storage.store import Store
from vpstore.verbs.pull import pull
from vpstore.verbs.push import push
from vpstore.workspace import Workspace

ADA, BOB = 41001, 41002
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become two other users")


def commands(member: Member, *several: list[str], codes: tuple[int, ...] = (0,), **more: str) -> Commands:
    """Commands in a person's checkout."""
    return Commands(
        str(member.root), member.variables(**{"HOME": str(member.cache), **more}), list(several), list(codes)
    )


@cache
def server() -> PeopleServer:
    started = PeopleServer()
    atexit.register(started.close)
    return started


def become(user: int, act: Callable[[], object], *, umask: int, log: Path, groups: tuple[int, ...] = (GROUP,)) -> None:
    """Do something as another user."""
    who = {"user": user, "umask": umask, "log": str(log), "groups": list(groups)}
    if isinstance(act, Commands):
        code = server().act(act, who, log.parent)
    else:
        code = in_fork(lambda: (change_to(**who), act()))
    assert code == 0, log.read_text()


def give(path: Path, user: int) -> None:
    for folder, folders, files in os.walk(path):
        for name in (".", *folders, *files):
            os.chown(Path(folder) / name, user, user, follow_symlinks=False)


@pytest.fixture
def office(team: Team) -> Iterator[Team]:
    """A folder with a store that belongs to the group, and a checkout for each of two people."""
    if not _can_read(REPOSITORY, ADA):
        pytest.skip("other users cannot read this checkout of the program")
    team.folder.chmod(0o755)
    team.root.mkdir()
    os.chown(team.root, 0, GROUP)
    team.root.chmod(0o2775)
    (team.folder / "log").touch()
    (team.folder / "log").chmod(0o666)
    return team


def _can_read(path: Path, user: int) -> bool:
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
        os._exit(0 if os.access(path / "vpstore/__init__.py", os.R_OK) else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def person(team: Team, name: str, user: int, **steps: int) -> Member:
    member = team.checkout(name, **steps)
    member.cache.mkdir(exist_ok=True)
    give(member.root, user)
    give(member.cache, user)
    return member


def modes(root: Path) -> dict[str, int]:
    return {
        path.relative_to(root).as_posix(): stat.S_IMODE(path.lstat().st_mode)
        for path in (root, *sorted(root.rglob("*")))
        if not path.is_symlink()
    }


@as_root
def test_two_people_build_share_interrupt_repair_and_collect(office: Team) -> None:
    log = office.folder / "log"
    ada, bob = person(office, "ada", ADA), person(office, "bob", BOB)

    def as_ada(*several: list[str], codes: tuple[int, ...] = (0,), **more: str) -> None:
        become(ADA, commands(ada, *several, codes=codes, **more), umask=0o002, log=log)

    def as_bob(*several: list[str], codes: tuple[int, ...] = (0,), **more: str) -> None:
        become(BOB, commands(bob, *several, codes=codes, **more), umask=0o002, log=log)

    as_ada(["build", *STAGES], ["lock"])
    as_bob(["build", *STAGES], ["resolve", "plant", "--full"], ["verify", "--all"])
    assert log.read_text().count("cache hit") == 3  # bob built nothing
    # What is damaged in ada's name is replaced in bob's, and kept.
    artifact = ada.pointed("plant-bloom")["artifact"]
    store = office.store
    row = store.manifest(Digest(artifact)).by_path["model.safetensors"]
    blob = store.blobs.path(row.digest)
    os.chmod(blob, 0o644)
    blob.write_bytes(b"damage")
    os.chmod(blob, 0o444)
    as_bob(["build", "plant@bloom", "--force"], ["verify", "--all"])
    aside = list((office.root / "quarantine").iterdir())
    assert [path.read_bytes() for path in aside] == [b"damage"]
    # What ada began and was interrupted at, bob takes up: the same key, her scratch folder.
    for member in (ada, bob):
        member.set_steps(bloom=7)
        recipe = (member.root / "small/grow.py").read_text()
        (member.root / "small/grow.py").write_text(
            recipe.replace(
                '    (scratch / "metrics.json")',
                '    if os.environ.get("SMALL_STOP"):\n        os.kill(os.getpid(), 9)\n    (scratch / "metrics.json")',
            )  # noqa: E501
        )
    as_ada(["build", "plant@bloom"], codes=(1,), SMALL_STOP="1")
    scratch = next((office.root / "work").iterdir())
    assert (scratch / "model.safetensors").stat().st_uid == ADA
    as_bob(["build", "plant@bloom"], ["resolve", "plant", "--full"])
    assert list((office.root / "work").iterdir()) == []
    # And what nobody needs is collected by whoever comes, whoever it belonged to.
    for member in (ada, bob):
        for view in (member.root / "weights/tiny").glob("plant@*-*"):
            remove(view)
    as_ada(["build", "plant@sprout", "plant@bloom"])
    (ada.root / "vpstore.lock").unlink()
    before = len(list(store.blobs.all()))
    as_bob(["gc", "--grace", "0", "--quarantine"])
    assert len(list(store.blobs.all())) < before
    assert list((office.root / "quarantine").iterdir()) == []
    as_ada(["resolve", "plant", "--full"], ["verify", "--all"], ["gc", "--grace", "0"])
    office.check_names()
    assert {path.stat().st_uid for path in office.root.rglob("*")} >= {ADA, BOB}
    found = modes(office.root)
    assert {path.lstat().st_gid for path in office.root.rglob("*")} == {GROUP}
    for name, mode in found.items():
        if (office.root / name).is_dir():
            assert mode == 0o2775, name
        elif name.startswith(("blobs/", "keys/", "attestations/")) or name == "format":
            assert mode == 0o444, name
        else:
            assert mode in (0o644, 0o664), name


SHUT = """
    for path in (scratch / "model.safetensors", scratch / "metrics.json"):
        os.chmod(path, 0o600)
        if os.environ.get("SMALL_GROUP"):  # as a file that was made elsewhere and moved into the folder
            os.chown(path, -1, int(os.environ["SMALL_GROUP"]))
    if os.environ.get("SMALL_STOP"):
        os.kill(os.getpid(), 9)
"""


def with_shut_files(member: Member) -> Member:
    """As many libraries write them: for nobody but the one who runs the recipe."""
    recipe = member.root / "small/grow.py"
    text = recipe.read_text()
    assert text.count("    return Staged(") == 1
    recipe.write_text(text.replace("    return Staged(", f"{SHUT}    return Staged("))
    return member


@as_root
@pytest.mark.parametrize("umask", [0o002, 0o007])
@pytest.mark.parametrize("group", ["", str(ADA)])
def test_what_a_recipe_shut_is_shared_all_the_same(office: Team, umask: int, group: str) -> None:
    log = office.folder / "log"
    ada, bob = (with_shut_files(person(office, name, user)) for name, user in (("ada", ADA), ("bob", BOB)))
    become(ADA, commands(ada, ["build", *STAGES], ["lock"], SMALL_GROUP=group), umask=umask, log=log)
    reading = (["build", *STAGES], ["resolve", "plant", "--full"], ["audit", "plant"], ["verify", "--all"], ["doctor"])
    become(BOB, commands(bob, *reading), umask=umask, log=log)
    assert log.read_text().count("cache hit") == 3
    for path in (path for path in (office.root / "blobs").rglob("*") if path.is_file()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o444 & ~umask
        assert path.stat().st_gid == GROUP


@as_root
@pytest.mark.parametrize("resume", ["", "resume = true\n"])
def test_what_a_killed_recipe_shut_stops_nobody(office: Team, resume: str) -> None:
    log = office.folder / "log"
    ada, bob = (with_shut_files(person(office, name, user)) for name, user in (("ada", ADA), ("bob", BOB)))
    for member in (ada, bob):
        with (member.root / "pyproject.toml").open("a") as table:
            table.write(resume)
    become(ADA, commands(ada, ["build", "seed"]), umask=0o002, log=log)
    become(ADA, commands(ada, ["build", "plant@sprout"], codes=(1,), SMALL_STOP="1"), umask=0o002, log=log)
    become(BOB, commands(bob, ["build", "seed", "plant@sprout"], ["verify", "--all"]), umask=0o002, log=log)
    assert list((office.root / "work").iterdir()) == []


SHUT_FOLDER = """
    inner = scratch / "tmpshut"
    inner.mkdir(mode=0o700, exist_ok=True)
    (inner / "part").write_text("half")
    if os.environ.get("SMALL_STOP"):
        os.kill(os.getpid(), 9)
    (inner / "part").unlink()
    inner.rmdir()
    return Staged("""


@as_root
@pytest.mark.parametrize("resume", ["", "resume = true\n"])
@pytest.mark.parametrize("mode", [None, 0o2700, 0o2755])  # of the scratch folder itself; None: of one in it
def test_a_folder_that_a_killed_recipe_shut_stops_nobody(office: Team, resume: str, mode: int | None) -> None:
    log = office.folder / "log"
    ada, bob = person(office, "ada", ADA), person(office, "bob", BOB)
    for member in (ada, bob):
        recipe = member.root / "small/grow.py"
        recipe.write_text(recipe.read_text().replace("    return Staged(", SHUT_FOLDER.lstrip("\n")))
        with (member.root / "pyproject.toml").open("a") as table:
            table.write(resume)
    become(ADA, commands(ada, ["build", "seed"]), umask=0o002, log=log)
    become(ADA, commands(ada, ["build", "plant@sprout"], codes=(1,), SMALL_STOP="1"), umask=0o002, log=log)
    (left,) = (office.root / "work").iterdir()
    if mode is not None:
        left.chmod(mode)
    # gc names it, and goes on with all the rest.
    become(ADA, lambda: print(office.store.blobs.put_bytes(b"loose")), umask=0o002, log=log)
    abandoned = office.root / "tmp/999999999-0123456789abcdef"
    abandoned.touch()
    before = office.blobs()
    collecting = ["gc", "--grace", "0", "--dry-run"], ["gc", "--grace", "0"]
    log.write_text("")
    become(BOB, commands(bob, *collecting), umask=0o002, log=log)
    said = log.read_text()
    inner = left if mode is not None else left / "tmpshut"
    assert said.count(f"warning: work/{left.name} stays: this user cannot remove it, but its owner's gc does: ") == 2
    assert (
        said.count(f"{inner}: the folder belongs to {ADA}, group {GROUP}, mode {mode or 0o2700:o}; this is {BOB}") >= 2
    )
    assert Digest.of(b"loose") in before - office.blobs()
    assert not abandoned.exists()
    assert inner.is_dir()
    # The next builder begins beside it, and its owner removes it.
    become(BOB, commands(bob, ["build", "seed", "plant@sprout"], ["verify", "--all"]), umask=0o002, log=log)
    aside = list((office.root / "work").iterdir())
    assert [path.name.partition("-")[0] for path in aside] == [left.name]
    assert left not in aside
    become(BOB, commands(bob, ["gc"], ["gc", "--grace", "0"]), umask=0o002, log=log)
    assert list((office.root / "work").iterdir()) == aside
    become(ADA, commands(ada, ["gc", "--grace", "0"], ["build", "plant@sprout"]), umask=0o002, log=log)
    assert list((office.root / "work").iterdir()) == []


@as_root
@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_what_the_owner_shut_is_removed_by_the_owner(office: Team, mode: int) -> None:
    """As of a recipe that makes what it unpacks read-only."""
    log = office.folder / "log"
    ada = person(office, "ada", ADA)
    work = office.root / "work"

    def leave() -> None:
        inner = next(work.iterdir()) / "unpacked"
        inner.mkdir()
        (inner / "part").write_text("half")
        inner.chmod(mode)

    recipe = ada.root / "small/grow.py"
    text = recipe.read_text()
    recipe.write_text(text.replace("    return Staged(", SHUT_FOLDER.lstrip("\n")))
    become(ADA, commands(ada, ["build", "seed"]), umask=0o002, log=log)
    for then in (["build", "plant@sprout"], ["gc", "--grace", "0"]):
        become(ADA, commands(ada, ["build", "plant@sprout"], codes=(1,), SMALL_STOP="1"), umask=0o002, log=log)
        become(ADA, leave, umask=0o002, log=log)
        log.write_text("")
        become(ADA, commands(ada, then, ["gc", "--grace", "0"], ["build", "plant@sprout"]), umask=0o002, log=log)
        assert "warning" not in log.read_text()
        assert list(work.iterdir()) == []
        ada.set_steps(sprout=3)


@as_root
@pytest.mark.parametrize("what", ["blob", "folder"])
def test_what_a_person_may_not_read_is_said_and_is_no_damage(office: Team, what: str) -> None:
    log = office.folder / "log"
    ada, bob = person(office, "ada", ADA), person(office, "bob", BOB)
    become(ADA, commands(ada, ["build", *STAGES], ["lock"]), umask=0o002, log=log)
    become(BOB, commands(bob, ["build", *STAGES]), umask=0o002, log=log)
    artifact = ada.pointed("plant-bloom")["artifact"]
    blob = office.store.blobs.path(office.store.manifest(Digest(artifact)).by_path["model.safetensors"].digest)
    shut = blob if what == "blob" else blob.parent
    before = shut.stat().st_mode
    shut.chmod(before & 0o700)
    for arguments in (
        ["resolve", "plant"],
        ["build", "plant@bloom"],
        ["build", "plant@bloom", "--force"],
        ["export", "plant", "../out"],
        ["repair"],
    ):
        log.write_text("")
        become(BOB, commands(bob, arguments, codes=(1,)), umask=0o002, log=log)
        said = log.read_text()
        assert f"the {'file' if what == 'blob' else f'folder {shut}'} belongs to {ADA}, group {GROUP}, mode" in said
        assert re.search(r"^  next      (its owner, or root, lets|give) this user", said, re.MULTILINE)
        assert not [word for word in ("Traceback", "vpstore repair", "makes it again") if word in said]
    log.write_text("")
    become(BOB, commands(bob, ["verify", "--all"], ["verify", "plant"], codes=(3,)), umask=0o002, log=log)
    assert f"unreadable: Permission denied; the {'file' if what == 'blob' else 'folder'}" in log.read_text()
    assert "Traceback" not in log.read_text()
    log.write_text("")
    become(BOB, commands(bob, ["doctor"], codes=(1,)), umask=0o002, log=log)
    assert re.search(rf"FAIL  readable: .*{ADA}.*{shut}\n      next: {ADA}, or root: chmod -R ", log.read_text())
    advice = re.findall(r"chmod -R .*", log.read_text())[0].split()
    become(ADA, lambda: print(subprocess.run(advice, check=True)), umask=0o002, log=log)
    become(BOB, commands(bob, ["resolve", "plant"], ["verify", "--all"], ["doctor"]), umask=0o002, log=log)
    assert list((office.root / "quarantine").iterdir()) == []


def cured(log: Path, bob: Member, *, codes: tuple[int, ...] = (1,)) -> str:
    """Follow the one advice of doctor on what is shut, as its owner; what doctor said."""
    log.write_text("")
    become(BOB, commands(bob, ["doctor"], codes=codes), umask=0o002, log=log)
    said = log.read_text()
    (advice,) = re.findall(rf"FAIL  readable: .* belong to {ADA}: .*\n      next: {ADA}, or root: (chmod .*)", said)
    become(ADA, lambda: print(subprocess.run(advice, shell=True, capture_output=True)), umask=0o002, log=log)
    return said


def check_modes(root: Path) -> None:
    """All of the store is for the group, nothing for others that was not before, and no blob can be written."""
    for name, mode in modes(root).items():
        if (root / name).is_dir():
            assert mode & 0o2770 == 0o2770, name
        elif name.startswith(("blobs/", "keys/", "attestations/")) or name == "format":
            assert mode in (0o440, 0o444), name
        else:
            assert mode in (0o640, 0o660, 0o644, 0o664), name


@as_root
def test_a_store_that_was_made_for_one_is_opened_to_the_group(office: Team) -> None:
    log = office.folder / "log"
    ada, bob = person(office, "ada", ADA), person(office, "bob", BOB)
    become(ADA, commands(ada, ["build", *STAGES], ["lock"]), umask=0o077, log=log)
    log.write_text("")
    become(BOB, commands(bob, ["ls"], ["build", "seed"], codes=(10,)), umask=0o002, log=log)
    assert "error: the store is shut to this user" in log.read_text()
    assert f"Permission denied; the file belongs to {ADA}, group {GROUP}, mode 0400; this is {BOB}" in log.read_text()
    said = cured(log, bob)
    assert f"FAIL  store: the store is shut to this user: {office.root}/format: Permission denied; the file" in said
    assert "Traceback" not in said
    check_modes(office.root)
    bob.set_steps(bloom=5)
    acts = (["doctor"], ["build", *STAGES], ["build", "seed", "--force"], ["verify", "--all"], ["gc", "--grace", "0"])
    become(BOB, commands(bob, *acts), umask=0o002, log=log)
    become(ADA, commands(ada, ["resolve", "plant", "--full"], ["doctor"]), umask=0o002, log=log)


@as_root
def test_what_was_used_with_another_umask_is_opened_to_the_group(office: Team) -> None:
    log = office.folder / "log"
    ada, bob = person(office, "ada", ADA), person(office, "bob", BOB)
    become(ADA, commands(ada, ["build", "seed"]), umask=0o002, log=log)
    become(BOB, commands(bob, ["build", "seed"]), umask=0o002, log=log)
    become(ADA, commands(ada, ["build", *STAGES], ["lock"]), umask=0o077, log=log)
    become(BOB, commands(bob, ["verify", "--all"], codes=(3,)), umask=0o002, log=log)
    become(BOB, commands(bob, ["gc"], codes=(1,)), umask=0o002, log=log)
    cured(log, bob)
    check_modes(office.root)
    acts = (["doctor"], ["build", *STAGES, "--force"], ["verify", "--all"], ["gc", "--grace", "0"])
    become(BOB, commands(bob, *acts), umask=0o002, log=log)


@as_root
@pytest.mark.parametrize("part", ["roots/*.json", "locks/store.lock", "work", "tmp", "blobs/blake3/*"])
def test_the_cure_is_no_wider_than_what_is_shut(office: Team, part: str) -> None:
    """Neither another part of the store, nor what a build under way has in its folder."""
    log = office.folder / "log"
    ada, bob = person(office, "ada", ADA), person(office, "bob", BOB)
    become(ADA, commands(ada, ["build", *STAGES]), umask=0o002, log=log)
    own = [office.root / "work/mine", office.root / "tmp/mine", office.root / "quarantine/mine"]
    for path in own:
        path.touch(mode=0o600)
    own.append(office.root / "keys")
    own[-1].chmod(0o2770)  # open to the group, and to it alone
    shut = sorted(office.root.glob(part))[0]
    shut.chmod(stat.S_IMODE(shut.stat().st_mode) & 0o2700)
    before = modes(office.root)
    said = cured(log, bob)
    assert f": {shut}\n" in said
    changed = {name for name, mode in modes(office.root).items() if mode != before[name]}
    assert changed == {shut.relative_to(office.root).as_posix()}
    become(BOB, commands(bob, ["doctor"], ["build", *STAGES]), umask=0o002, log=log)


@as_root
def test_a_store_of_one_is_opened_for_reading_alone(office: Team) -> None:
    log = office.folder / "log"
    ada, bob = person(office, "ada", ADA), person(office, "bob", BOB)
    os.chown(office.root, ADA, ADA)
    office.root.chmod(0o755)
    become(ADA, commands(ada, ["build", *STAGES], ["lock"]), umask=0o022, log=log)
    (bob.root / "vpstore.lock").write_bytes((ada.root / "vpstore.lock").read_bytes())
    before = modes(office.root)
    for name in ("blobs/blake3", "roots", "locks/store.lock", "format"):
        (office.root / name).chmod(before[name] & 0o700)
    cured(log, bob)
    assert modes(office.root) == before
    become(BOB, commands(bob, ["resolve", "plant"], ["verify", "--all"]), umask=0o002, log=log)


@as_root
def test_a_partial_download_of_another_person_is_taken_up(office: Team) -> None:
    data = b"0123456789" * 1000
    digest = Digest.of(data)
    log = office.folder / "log"

    def receive(user: int, until: int) -> Callable[[], None]:
        def act() -> None:
            store = Store.create(office.root, stamps=Stamps(office.folder / f"stamps-{user}"))

            def chunks(start: int) -> Iterator[bytes]:
                for at in range(start, len(data), 1000):
                    if at >= until:
                        raise ConnectionError
                    yield data[at : at + 1000]

            try:
                store.blobs.receive(digest, len(data), chunks, moved=lambda count: None)
            except ConnectionError:
                assert until < len(data)

        return act

    for until in (5000, len(data)):
        become(ADA if until < len(data) else BOB, receive(until, until), umask=0o002, log=log)
    assert office.store.blobs.is_whole(digest)
    assert stat.S_IMODE(office.store.blobs.path(digest).stat().st_mode) == 0o444  # though ada began it
    # Finished and read-only, but killed before it had its name.
    office.store.blobs.path(digest).unlink()
    partial = office.root / "tmp/partial" / digest.hex
    become(ADA, lambda: (partial.write_bytes(data), partial.chmod(0o444), None)[-1], umask=0o002, log=log)
    become(BOB, receive(1, len(data)), umask=0o002, log=log)
    assert office.store.blobs.is_whole(digest)


@as_root
def test_a_checkout_that_may_not_be_read_keeps_what_it_had(office: Team) -> None:
    log = office.folder / "log"
    ada, bob = person(office, "ada", ADA), person(office, "bob", BOB, bloom=5)
    become(ADA, commands(ada, ["build", *STAGES]), umask=0o002, log=log)
    for ref in STAGES:
        ada.drop(ref, "view")
    ada.root.chmod(0o700)
    become(BOB, commands(bob, ["build", *STAGES], ["gc", "--grace", "0"]), umask=0o002, log=log)
    assert "Permission denied; it keeps what it had" in log.read_text()
    become(ADA, commands(ada, ["resolve", "plant", "--full"]), umask=0o002, log=log)
    become(BOB, commands(bob, ["gc", "--grace", "0", "--forget", str(ada.root)]), umask=0o002, log=log)
    become(ADA, commands(ada, ["resolve", "plant", "--full"], codes=(12,)), umask=0o002, log=log)


@as_root
def test_who_may_only_read_the_store_resolves_and_is_told(office: Team) -> None:
    log = office.folder / "log"
    ada, eve = person(office, "ada", ADA), person(office, "eve", BOB)
    become(ADA, commands(ada, ["build", *STAGES], ["lock"]), umask=0o002, log=log)
    (eve.root / "vpstore.lock").write_bytes((ada.root / "vpstore.lock").read_bytes())
    before = modes(office.root)
    log.write_text("")
    become(BOB, commands(eve, ["resolve", "plant", "--full"]), umask=0o022, log=log, groups=())
    assert "will not know of this view" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert modes(office.root) == before
    office.store.blobs.put_bytes(b"loose")
    become(BOB, commands(eve, ["gc", "--grace", "0", "--dry-run"]), umask=0o022, log=log, groups=())
    become(BOB, commands(eve, ["gc", "--grace", "0"], codes=(1,)), umask=0o022, log=log, groups=())
    assert "collecting failed: Permission denied" in log.read_text()
    assert "Traceback" not in log.read_text()


@as_root
def test_who_may_only_read_a_store_that_was_pulled_resolves_and_exports(office: Team, tmp_path: Path) -> None:
    """Nobody ever resolved in this store, so it has no locks but its own."""
    log = office.folder / "log"
    ada, eve = person(office, "ada", ADA), person(office, "eve", BOB)
    own = {"VPSTORE_ROOT": str(ada.root / ".vpstore")}
    become(ADA, commands(ada, ["build", *STAGES], ["lock"], **own), umask=0o022, log=log)
    (eve.root / "vpstore.lock").write_bytes((ada.root / "vpstore.lock").read_bytes())
    shelf = DirectoryRemote(tmp_path / "shelf", "shelf")
    theirs = Workspace(Checkout.find(ada.root), Store.open(ada.root / ".vpstore"))
    assert not push(theirs, built_here(theirs, theirs.checkout.objects.order), shelf).failures
    ours = Workspace(Checkout.find(eve.root), Store.create(office.root))
    assert not pull(ours, agreed(ours, None), shelf).failures
    remove(eve.root / "weights")
    before = modes(office.root)
    log.write_text("")
    acts = [["resolve", "plant"], ["resolve", "plant", "--full"], ["export", "plant", str(eve.cache / "plant")]]
    become(BOB, commands(eve, *acts), umask=0o022, log=log, groups=())
    assert "will not know of this view" in log.read_text()
    assert (eve.cache / "plant" / "model.safetensors").is_file()
    assert modes(office.root) == before


@as_root
def test_somebody_without_a_home_does_without_stamps_and_memory(office: Team) -> None:
    log = office.folder / "log"
    ada = person(office, "ada", ADA)
    homeless = {"HOME": "~", "XDG_CACHE_HOME": ""}  # as where HOME is not set and the user is a mere number
    acts = (["build", *STAGES], ["resolve", "plant"], ["audit", "plant"], ["verify", "--all"], ["lock"], ["gc"])
    become(ADA, commands(ada, *acts, **homeless), umask=0o002, log=log)
    assert "Traceback" not in log.read_text()
    log.write_text("")
    become(ADA, commands(ada, ["doctor"], codes=(1,), **homeless), umask=0o002, log=log)
    assert re.findall("FAIL  (.*)\n      next: (.*)", log.read_text()) == [
        (
            "stat stamps: this user has no home, so all that is used is read every time",
            "set HOME or XDG_CACHE_HOME to a folder that this user can write",
        )
    ]
    assert [path.name for path in ada.cache.iterdir()] == []


@as_root
def test_a_private_store_stays_private(office: Team) -> None:
    log = office.folder / "log"
    ada = person(office, "ada", ADA)
    private = office.folder / "private"
    private.mkdir()
    os.chown(private, ADA, ADA)
    private.chmod(0o700)
    variables = {"VPSTORE_ROOT": str(private)}
    act = commands(ada, ["build", *STAGES], ["lock"], ["resolve", "plant"], ["gc", "--grace", "0"], **variables)
    become(ADA, act, umask=0o077, log=log)
    for top in (private, ada.root / "weights", ada.root / "reports", ada.cache):
        assert {name: oct(mode) for name, mode in modes(top).items() if mode & 0o077 and name != "."} == {}
    assert (ada.root / "vpstore.lock").stat().st_mode & 0o077 == 0


def test_no_file_is_more_open_than_the_umask_allows(team: Team) -> None:
    """The same without other users: one person, two umasks."""
    before = os.umask(0o077)
    try:
        ada = team.checkout("ada")
        for arguments in (["build", *STAGES], ["lock"], ["resolve", "plant"], ["gc", "--grace", "0"]):
            commands(ada, arguments)()
    finally:
        os.umask(before)
    for top in (team.root, ada.root / "weights"):
        assert {name: oct(mode) for name, mode in modes(top).items() if mode & 0o077} == {}
