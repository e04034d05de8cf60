"""Remembered preparations: every way of changing what decided one voids it, and what cannot be watched is not kept."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_project import RUN, Project, write

from vpstore.schema.digest import Digest
from vpstore.storage import observing
from vpstore.storage.memory import MAX_ANSWERS, Memory
from vpstore.storage.observing import Observation
from vpstore.storage.stamps import COARSE_RACY_NS

WITNESSES = """
from vpstore.storage import observing
observing.begin()
import json, sys
from pathlib import Path
from vpstore.preparation import prepare
from vpstore.schema.ref import StageRef
from vpstore.workspace import Workspace
work = Workspace.find(Path.cwd())
with observing.Observation() as seen:
    prepare(work, StageRef("plant", "sprout"))
found = seen.witnesses(work.checkout.root, outside=(*work.checkout.outputs, work.store.root))
print(json.dumps(None if found is None else sorted(found)))
"""


def witnesses(project: Project, *program: str, **variables: str) -> list[str] | None:
    """What a process of its own says that the preparation of plant@sprout depends on."""
    done = subprocess.run(
        [sys.executable, *(program or ("-c", WITNESSES))],
        cwd=project.root,
        env={**project.variables(), **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    found: list[str] | None = json.loads(done.stdout)
    return found


def look(paths: list[str]) -> list[Any]:
    """The stats of the witnesses; a witness that is gone is a change as well."""
    return [tuple(os.stat(path))[:7] + (os.stat(path).st_ctime_ns,) if os.path.exists(path) else None for path in paths]


def edit(path: Path) -> None:
    """Other bytes of the same length, with the times put back."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    with path.open("r+b") as file:  # in place: the inode stays
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path: Path) -> None:
    """Another file under the name, with the times put back."""
    before = path.stat()
    fresh = path.with_name("fresh")
    fresh.write_bytes(path.read_bytes())
    os.utime(fresh, ns=(before.st_atime_ns, before.st_mtime_ns))
    fresh.rename(path)


def renamed(path: Path) -> None:
    path.rename(path.with_name(f"was-{path.name}"))


FILES = ("configs/objects.toml", "configs/plant.toml", "configs/profiles/tiny.toml", "small/run.py", "small/grow.py",
         "small/soil.py", "small/__init__.py")  # fmt: skip
NEW = {
    "a package that shadows a module of the recipe": "small/grow/__init__.py",
    "a package in a folder that was there": "small/soil/__init__.py",
    "a module that shadows the standard library's": "tomllib.py",
    "a module in a folder that was there, which shadows the standard library's": "dataclasses/__init__.py",
    "a file that code may look for": "configs/override.toml",
    "a file in a folder without any": "data/deep/switch",
    "a profile": "configs/profiles/other.toml",
}


@pytest.fixture(scope="module")
def watched(template: Project, tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, list[str]]:
    """A project with a few more folders, and what its preparation depends on."""
    root = tmp_path_factory.mktemp("watched")
    shutil.copytree(template.root, root / "checkout", symlinks=True)
    project = Project(root / "checkout", root / "cache")
    for folder in ("small/soil", "dataclasses", "data/deep"):
        (project.root / folder).mkdir(parents=True)
    for file in ("configs/profiles/tiny.toml", "small/__init__.py"):
        write(project.root, file, "# not empty\n")
    found = witnesses(project)
    assert found is not None
    return project, found


def voids(watched: tuple[Project, list[str]], change: Callable[[Path], None], path: str) -> bool:
    project, paths = watched
    before = look(paths)
    assert look(paths) == before  # looking changes nothing
    newest = max(row[-1] for row in before if row is not None)
    while time.time_ns() - newest < 20_000_000:
        time.sleep(0.005)  # the kernel's clock for files has ticks
    change(project.root / path)
    return look(paths) != before


@pytest.mark.parametrize("path", FILES)
def test_an_edit_with_size_and_time_put_back_is_seen(watched: tuple[Project, list[str]], path: str) -> None:
    assert voids(watched, edit, path)
    edit(watched[0].root / path)


@pytest.mark.parametrize("path", FILES)
def test_another_file_under_the_name_is_seen(watched: tuple[Project, list[str]], path: str) -> None:
    assert voids(watched, replaced, path)


@pytest.mark.parametrize("path", FILES)
def test_a_file_that_is_gone_or_renamed_is_seen(watched: tuple[Project, list[str]], path: str) -> None:
    file = watched[0].root / path
    data = file.read_bytes()
    for change in (renamed, Path.unlink):
        assert voids(watched, change, path)
        file.write_bytes(data)


@pytest.mark.parametrize("what", NEW)
def test_a_new_file_is_seen(watched: tuple[Project, list[str]], what: str) -> None:
    def appear(path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text("")

    assert voids(watched, appear, NEW[what])
    (watched[0].root / NEW[what]).unlink()


def test_vpstore_itself_and_the_libraries_count(watched: tuple[Project, list[str]]) -> None:
    paths = watched[1]
    repository = Path(observing.__file__).parents[2]
    for module in ("vpstore/code.py", "vpstore/runner.py", "vpstore/schema/manifest.py", "vpstore/storage"):
        assert str(repository / module) in paths
    assert json.__file__ in paths
    assert not any(path.startswith(str(watched[0].root / "weights")) for path in paths)


@pytest.mark.parametrize(
    "line",
    [
        "import subprocess; subprocess.run(['true'])",
        "os.system('true')",
        "import socket; socket.socket().connect_ex(('127.0.0.1', 9)); socket.getaddrinfo('127.0.0.1', 9)",
        "import sqlite3; sqlite3.connect(':memory:').close()",
        "open('/dev/null', 'w').close()",
        "os.chdir('/')",
    ],
)
def test_what_cannot_be_watched_is_not_remembered(project: Project, line: str) -> None:
    (project.root / ".vpstore").mkdir()
    (project.root / ".vpstore" / "format").write_bytes(b"vpstore 1\n")
    assert witnesses(project) is not None
    head = "def prepare(checkout, object, stage):\n"
    write(project.root, "small/run.py", RUN.replace(head, f"{head}    {line}\n"))
    assert witnesses(project) is None


@pytest.mark.parametrize(("name", "is_watched"), [("vpstore", True), ("notebook", False)])
def test_what_python_loads_at_its_start_counts_in_a_command_of_ours(
    project: Project, tmp_path: Path, name: str, is_watched: bool
) -> None:
    """Many environments load something by a `.pth` file; in another program, any code may have run before."""
    (project.root / ".vpstore").mkdir()
    (project.root / ".vpstore" / "format").write_bytes(b"vpstore 1\n")
    (tmp_path / "sitecustomize.py").write_text("import loaded_at_start\n")
    (tmp_path / "loaded_at_start.py").write_text("")
    (tmp_path / name).write_text(WITNESSES)
    path = os.pathsep.join([str(tmp_path), project.variables().get("PYTHONPATH", "")])
    found = witnesses(project, str(tmp_path / name), PYTHONPATH=path)
    assert (found is not None) is is_watched
    if found is not None:
        assert str(tmp_path / "loaded_at_start.py") in found


def test_a_process_that_had_loaded_other_code_remembers_nothing() -> None:
    """The test runner is such a process: its modules may be older than their files."""
    observing.begin()
    assert observing.begun_ns() is None
    with Observation() as seen:
        pass
    assert seen.witnesses(Path("/nowhere"), outside=()) is None


def test_an_answer_needs_files_at_rest_and_holds_until_one_changes(tmp_path: Path) -> None:
    path, folder = tmp_path / "file", tmp_path / "folder"
    path.write_text("1")
    folder.mkdir()
    memory = Memory(tmp_path / "answers")
    paths = [str(path), str(folder)]
    young = max(path.stat().st_ctime_ns, folder.stat().st_ctime_ns)
    assert not memory.remember("q", [1], paths=paths, since_ns=young + COARSE_RACY_NS - 1)
    assert not memory.remember("q", [1], paths=[*paths, str(tmp_path / "absent")], since_ns=young + 2 * COARSE_RACY_NS)
    assert memory.recall("q") is None
    assert memory.remember("q", [1, {"a": None}], paths=paths, since_ns=young + COARSE_RACY_NS)
    assert memory.recall("q") == [1, {"a": None}]
    assert memory.recall("another question") is None
    assert Memory(tmp_path / "answers", max_age=-1).recall("q") is None
    (folder / "new").touch()
    assert memory.recall("q") is None
    assert memory.remember("q", 2, paths=paths, since_ns=time.time_ns() + 2 * COARSE_RACY_NS)
    time.sleep(0.02)
    edit(path)
    assert memory.recall("q") is None


def test_a_damaged_answer_is_none(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "answers")
    now = time.time_ns() + 10 * COARSE_RACY_NS
    assert memory.remember("q", "yes", paths=["/"], since_ns=now)
    (file,) = (tmp_path / "answers").iterdir()
    whole = file.read_bytes()
    for at in range(0, len(whole), 7):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert memory.recall("q") is None
        file.write_bytes(whole[:at])
        assert memory.recall("q") is None
    file.write_bytes(whole)
    assert memory.recall("q") == "yes"
    assert memory.remember("other", "no", paths=["/"], since_ns=now)
    other = next(path for path in (tmp_path / "answers").iterdir() if path != file)
    file.write_bytes(other.read_bytes())  # the answer to another question
    assert memory.recall("q") is None


def test_the_oldest_answers_make_room(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    for number in range(MAX_ANSWERS + 5):
        assert memory.remember(str(number), number, paths=["/"], since_ns=time.time_ns() + 10 * COARSE_RACY_NS)
    assert len(list(tmp_path.iterdir())) == MAX_ANSWERS
    assert memory.recall(str(MAX_ANSWERS + 4)) == MAX_ANSWERS + 4


def test_answers_that_cannot_be_kept_cost_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    memory = Memory(tmp_path / "file" / "answers")
    assert not memory.remember("q", 1, paths=["/"], since_ns=time.time_ns() + 10 * COARSE_RACY_NS)
    assert memory.recall("q") is None


def stale(project: Project, *, directory: str = ".", **more: str) -> str:
    """What a command of its own process warns of."""
    done = subprocess.run(
        [sys.executable, "-m", "vpstore", "resolve", "plant@sprout"],
        cwd=project.root / directory,
        env=project.variables(**more),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stderr


def poison(project: Project) -> None:
    """Make every remembered answer wrong in a way that shows, so that its use shows."""
    files = list((project.cache / "vpstore" / "answers").iterdir())
    assert files
    for file in files:
        kept = json.loads(file.read_bytes().partition(b"\n")[2])
        kept["answer"][4]["poisoned.py"] = kept["answer"][1] = Digest.of(b"poison")
        body = json.dumps(kept).encode()
        file.write_bytes(Digest.of(body).encode() + b"\n" + body)


def at_rest(project: Project) -> None:
    newest = max(path.lstat().st_ctime_ns for path in project.root.rglob("*") if ".vpstore" not in path.parts)
    time.sleep(max(0.0, (newest + COARSE_RACY_NS - time.time_ns()) / 1e9 + 0.1))


def test_the_command_uses_what_it_remembers_and_never_beyond_a_change(built: Project) -> None:
    stale(built)  # makes the view, and with it folders
    at_rest(built)
    assert stale(built) == ""
    poison(built)
    assert "poisoned.py" in stale(built)  # it was remembered, and is used
    assert stale(built, directory="configs") == ""  # another question
    assert stale(built, SMALL_ANYTHING="x") == ""
    config = built.root / "configs" / "plant.toml"
    before = config.stat()
    with config.open("r+b") as file:
        file.write(config.read_bytes().replace(b"step = 1", b"step = 7"))
    os.utime(config, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "since it was built these changed: params: step" in stale(built)
    built.run("build", "plant@sprout")
    assert stale(built) == ""
    (built.root / "small" / "soil.py").write_text((built.root / "small" / "soil.py").read_text() + "\nmore = 1\n")
    assert "code: small/soil.py" in stale(built)


def test_build_never_goes_by_what_is_remembered(built: Project) -> None:
    stale(built)
    at_rest(built)
    stale(built)
    poison(built)
    planned = built.json("build", "plant@sprout", "--dry-run")
    assert planned == built.json("build", "plant@sprout", "--dry-run", XDG_CACHE_HOME=str(built.cache / "empty"))
    assert built.run("lock", "--check", code=15).returncode == 15  # nothing is locked; and no other fault
