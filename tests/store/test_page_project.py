"""The project of docs/OWN_PROJECT.md in the hands of a beginner: builds that are killed, fail, or try to leave.

Its files are those of the page, as they stand there; only the faults are a test's.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_project import REPOSITORY, Project

from vpstore.checkout import Checkout
from vpstore.errors import VpstoreError
from vpstore.project_code import project_code

PAGE = (REPOSITORY / "docs" / "OWN_PROJECT.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`([\w./]+)`[^\n]*(?:\n[^`\n][^\n]*)*\n\n```\w*\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
FAULT = """
    import os, time
    fault = os.environ.get("GARDEN_FAULT", "")
    if fault:
        (out / "half.json").write_text("{}")
        (out / "begun").mkdir()
        (out / "begun" / "half.json").write_text("{}")
    if fault == "sleep":
        time.sleep(60)
    if fault == "error":
        raise ValueError("loss is nan")
    if fault.startswith("leave"):
        raise SystemExit(int(fault[5:]))
"""


@pytest.fixture
def garden(tmp_path: Path) -> Project:
    """The page's project, with a recipe that can be made to fail."""
    made = Project(tmp_path / "garden", tmp_path / "cache")
    for path, text in FILES.items():
        (made.root / path).parent.mkdir(parents=True, exist_ok=True)
        (made.root / path).write_text(text)
    with (made.root / "garden/sow.py").open("a") as recipe:
        recipe.write(FAULT)
    return made


def edit(project: Project, path: str, old: str, new: str) -> None:
    file = project.root / path
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def paths(project: Project, ref: str) -> list[str]:
    return sorted(row["path"] for row in project.json("show", ref)["manifest"]["files"])


def stopped(project: Project, how: signal.Signals) -> tuple[int, str]:
    """A build of the seed that is stopped when all of its files are there."""
    process = subprocess.Popen(
        project.command("build", "seed"),
        cwd=project.root,
        env=project.variables(GARDEN_FAULT="sleep"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 60
    while not list(project.store.glob("work/*/out/begun/half.json")):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def test_a_killed_build_is_built_again_and_nothing_of_it_is_published(garden: Project) -> None:
    assert stopped(garden, signal.SIGKILL)[0] == -9
    garden.run("build", "seed")
    assert paths(garden, "seed") == ["model.safetensors", "provenance.json", "reports/metrics.json"]
    first = garden.json("build", "seed")["builds"][0]["artifact"]
    assert garden.json("build", "seed", "--force")["builds"][0]["artifact"] == first


def test_an_interrupted_build_says_what_the_next_one_does_and_it_does_it(garden: Project) -> None:
    code, said = stopped(garden, signal.SIGINT)
    assert code == 130
    assert "next      vpstore build seed@main begins anew" in said
    garden.run("build", "seed")
    assert "reports/metrics.json" in paths(garden, "seed")


def test_an_error_of_a_recipe_is_told_with_its_place_as_often_as_it_happens(garden: Project) -> None:
    for _ in range(2):
        said = garden.run("build", "seed", code=1, GARDEN_FAULT="error").stderr
        assert re.search(r"^  where     garden/sow\.py:\d+$", said, re.MULTILINE), said
        assert "  found     ValueError: loss is nan\n" in said
        assert re.search(r"^  next      \S", said, re.MULTILINE)
        assert 'raise ValueError("loss is nan")' in said  # the project's own lines, and none of the program's
        assert "vpstore/" not in said
    garden.run("build", "seed")


@pytest.mark.parametrize("code", [0, 1, 20])
def test_a_recipe_that_leaves_is_a_failure_whatever_its_exit_code(garden: Project, code: int) -> None:
    garden.run("build", "seed")
    edit(garden, "configs/seed.toml", "7", "8")
    before = garden.listing()
    said = garden.run("build", "seed", code=20, GARDEN_FAULT=f"leave{code}").stderr
    assert f"  found     SystemExit({code})\n" in said
    assert "garden/sow.py:" in said
    assert "Traceback" not in said
    assert garden.listing() == before


def test_a_recorded_recipe_that_leaves_was_not_killed(garden: Project) -> None:
    garden.run("build", "seed")
    said = garden.run("reproduce", "seed", code=20, GARDEN_FAULT="leave0").stderr
    assert "  found     SystemExit(0)\n" in said
    assert "memory" not in said
    edit(garden, "garden/sow.py", "raise SystemExit(", "os._exit(")
    garden.run("build", "seed")
    said = garden.run("reproduce", "seed", code=20, GARDEN_FAULT="leave0").stderr
    assert "ended before there was a result" in said
    assert "found     exit status 0" in said
    assert "memory" not in said


FUNCTIONS = ("prepare", "environment", "produce", "param_keys")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_runner_that_leaves_is_a_failure(garden: Project, function: str) -> None:
    run = garden.root / "garden/run.py"
    run.write_text(re.sub(rf"(def {function}\(.*\):\n)", r"\1    raise SystemExit(0)\n", run.read_text()))
    command = ("pipeline",) if function == "param_keys" else ("build", "seed")
    said = garden.run(*command, code=20).stderr
    assert "garden/run.py:" in said
    assert re.search(r"^  next      \S", said, re.MULTILINE)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_runner_that_returns_nothing_is_told(garden: Project, function: str) -> None:
    run = garden.root / "garden/run.py"
    run.write_text(re.sub(rf"(def {function}\(.*\):\n)", r"\1    return None\n", run.read_text()))
    command = ("pipeline",) if function == "param_keys" else ("build", "seed")
    said = garden.run(*command, code=2).stderr
    assert "the runner returns something else" in said
    assert "Traceback" not in said


BROKEN = {
    "config": ("configs/plant.toml", "[", "configs/plant.toml"),
    "no config": ("configs/plant.toml", "", "configs/plant.toml"),
    "runner": ("garden/run.py", "x = 1\ndef (\n", "garden/run.py:2"),
    "runner that fails": ("garden/run.py", "x = {}['a']\n", "garden/run.py:1"),
    "runner that leaves": ("garden/run.py", "raise SystemExit(0)\n", "garden/run.py:1"),
}
WITHOUT = (
    "resolve plant",
    "show plant",
    "audit plant",
    "resolve plant --locked",
    "export plant ../out",
    "verify --all",
)
NEEDED = ("build plant", "build plant --dry-run", "lock --check", "pipeline")


OFTEN = {"config", "runner that leaves"}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in OFTEN else pytest.mark.slow) for case in BROKEN]
)
def test_what_does_not_parse_stops_only_what_needs_it(garden: Project, case: str) -> None:
    path, text, where = BROKEN[case]
    garden.run("build", "--all")
    garden.run("lock")
    file = garden.root / path
    file.write_text(text) if text else file.unlink()
    for line in WITHOUT:
        done = garden.run(*line.split())
        assert "Traceback" not in done.stderr, line
        if line.startswith("resolve"):
            assert re.search(rf"warning: plant@grown: whether it is stale cannot be told: .*{where}", done.stderr), line
    for line in NEEDED:
        code = {"runner that fails": 1, "runner that leaves": 20}.get(case, 2)
        said = garden.run(*line.split(), code=code).stderr
        assert f"  where     {where}\n" in said, line
        assert re.search(r"^  next      \S", said, re.MULTILINE)
        assert ("Traceback" in said) == (case == "runner that fails"), line
    [failed] = [check for check in garden.json("doctor", code=1)["checks"] if not check["ok"]]
    assert failed["name"] == ("runner" if "runner" in case else "recipes")
    assert where in failed["detail"]


def test_a_library_that_meets_a_full_disk_in_its_own_words_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for free in (1 << 30, 5000):
        monkeypatch.setattr(shutil, "disk_usage", lambda place, free=free: SimpleNamespace(free=free))
        with pytest.raises(VpstoreError) as caught, project_code("garden.sow", tmp_path, scratch=tmp_path):
            raise RuntimeError("I/O error: os error 28")
        assert ("free space" in caught.value.next_step) == (free == 5000)
        assert "I/O error: os error 28" in caught.value.trace


def test_this_repository_takes_up_what_an_interruption_left() -> None:
    assert Checkout.find(REPOSITORY).config.resume
    assert "resume" not in FILES["pyproject.toml"]  # the page's runner does not
