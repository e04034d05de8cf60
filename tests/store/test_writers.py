"""Every command that writes: below the checkout it writes through folders held open, or into the store."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from small_project import Project

# In one process: a disk that notes the paths that it is asked to change, and commands one after another.
SCRIPT = """
import json, os, shutil, sys
from pathlib import Path
from vpstore.cli import main
from vpstore.storage import system

noted = {}

class Noting(system.Disk):
    def __getattribute__(self, name):
        call = super().__getattribute__(name)
        def noting(*given):
            noted.setdefault(current, []).append([name, *(os.path.abspath(p) for p in given if isinstance(p, Path))])
            return call(*given)
        return noting

system.disk = Noting()
if "--past" in sys.argv:  # a control: a writer that goes by the name
    from contextlib import nullcontext
    from vpstore.storage import beneath
    beneath.opened = lambda root, folder, create=True: nullcontext(folder)
for number, (command, lost) in enumerate(json.loads(sys.stdin.read())):
    for path in lost:
        shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
    current = f"{number} {command[0]}"
    try:
        main(command)
    except SystemExit as leaving:
        assert leaving.code == 0, (command, leaving.code)
print(json.dumps(noted))
"""


def noted(project: Project, commands: list[tuple[list[str], list[str]]], *flags: str) -> dict[str, list[list[str]]]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *flags], cwd=project.root, env=project.variables(),
        input=json.dumps(commands), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def past(project: Project, calls: dict[str, list[list[str]]]) -> list[str]:
    """The calls that name a path below the checkout and outside its store, by its name."""
    root, store = f"{project.root}{os.sep}", f"{project.store}{os.sep}"
    return [
        f"{command}: {name} {path}"
        for command, rows in calls.items()
        for name, *paths in rows
        for path in paths
        if path.startswith(root) and not f"{path}{os.sep}".startswith(store)
    ]


@pytest.fixture
def commands(project: Project) -> list[tuple[list[str], list[str]]]:
    run = project.root / "small/run.py"
    run.write_text(run.read_text() + "\n\ndef param_keys(checkout, object, stage):\n    return {}\n")
    (project.root / ".dvc").mkdir()
    url = project.root.parent / "remote"
    (project.root / ".dvc/config").write_text(f"[core]\n    remote = r\n['remote \"r\"']\n    url = {url}\n")
    folder = "reports/tiny/plant-bloom"
    (project.root / folder / "metrics.json").mkdir(parents=True)
    return [
        (["build", "--all"], []),
        (["lock"], []),
        (["push"], []),
        (["pull"], [".vpstore", "weights"]),
        (["resolve", "plant"], []),
        (["import", "seed", "assets/donor", "--force"], [f"{folder}/metrics.json"]),
        (["build", "plant"], []),
        (["pipeline", "--write"], []),
        (["reproduce", "plant"], []),
        (["repair"], []),
        (["gc"], []),
        (["verify", "--all"], []),
    ]


def test_no_command_writes_into_the_checkout_by_a_name(
    project: Project, commands: list[tuple[list[str], list[str]]]
) -> None:
    calls = noted(project, commands)
    assert past(project, calls) == []
    writing = {name.partition(" ")[2] for name, rows in calls.items() if any(len(row) > 1 for row in rows)}
    assert {"build", "lock", "push", "pull", "resolve", "import", "pipeline"} <= writing


def test_a_writer_that_goes_past_is_noticed(built: Project) -> None:
    assert past(built, noted(built, [(["build", "plant"], ["weights/tiny/refs/plant-bloom.json"])], "--past"))
