"""A folder in a file's place, a file in a folder's, a link in a circle, nothing at all: said, never a traceback."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_project import Project, server

FILES = [
    "weights/tiny/refs/plant-bloom.json", "vpstore.lock", "configs/objects.toml", "configs/profiles/tiny.toml",
    "params.yaml", "pyproject.toml", "small/grow.py", ".vpstore/format", ".vpstore/locks/store.lock",
]  # fmt: skip
FOLDERS = [
    "weights/tiny/refs", "weights/tiny", "weights", "reports", ".vpstore", ".vpstore/blobs", ".vpstore/keys",
    ".vpstore/attestations", ".vpstore/roots", ".vpstore/roots/running", ".vpstore/tmp", ".vpstore/locks",
    ".vpstore/work", ".vpstore/quarantine",
]  # fmt: skip
CASES = [("folder", path) for path in FILES] + [("file", path) for path in FOLDERS]
CASES += [(kind, path) for kind in ("nothing", "circle") for path in FILES + FOLDERS]
SAMPLE = [
    ("folder", "vpstore.lock"), ("folder", ".vpstore/format"), ("file", "weights/tiny/refs"), ("file", ".vpstore/tmp"),
    ("circle", "params.yaml"),
]  # fmt: skip
COMMANDS = (
    ["resolve", "plant"], ["build", "plant"], ["ls"], ["verify", "--all"], ["lock"], ["audit", "plant"],
    ["gc", "--dry-run"], ["doctor"], ["show", "plant"], ["graph", "plant"], ["build", "plant", "--force"],
)  # fmt: skip


def ends(project: Project, *arguments: str) -> tuple[int, str, str]:
    """A command, however it ends."""
    folder = project.cache / "output"
    folder.mkdir(parents=True, exist_ok=True)
    return server().run(list(arguments), cwd=project.root, environment=project.variables(), folder=folder)


def put(kind: str, path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    match kind:
        case "folder":
            path.mkdir()
        case "file":
            path.write_text("x")
        case "circle":
            path.symlink_to(path.name)


def say(project: Project, kind: str, path: str, commands: tuple[list[str], ...]) -> None:
    put(kind, project.root / path)
    for command in commands:
        code, _, said = ends(project, *command)
        assert "Traceback" not in said, (command, said)
        assert code in (0, 1, 2, 3, 10, 11, 12, 13, 14, 20), (command, code)


@pytest.mark.parametrize(("kind", "path"), SAMPLE)
def test_what_lies_in_an_odd_place_is_said(built: Project, kind: str, path: str) -> None:
    say(built, kind, path, COMMANDS[:3])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "path"), CASES)
def test_whatever_lies_in_any_place_is_said(built: Project, kind: str, path: str) -> None:
    say(built, kind, path, COMMANDS)


def test_a_store_whose_empty_folders_were_left_out_by_a_copy_works(built: Project) -> None:
    for name in ("tmp", "locks", "work", "quarantine", "roots/running"):
        shutil.rmtree(built.store / name)
    built.run("resolve", "plant")
    built.run("build", "plant", "--force")
    built.run("verify", "--all")
