"""The folder of reports: what a build wrote is a build's, all else is a person's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from small_project import Project

EXTRA = """
    extra = []
    for name in filter(None, os.environ.get("SMALL_EXTRA", "").split()):
        (scratch / name.replace("/", "-")).write_text(name + str(step))
        extra.append(StagedFile("reports/" + name, "text/plain", scratch / name.replace("/", "-")))
    return Staged(
        extra + ["""


@pytest.fixture
def garden(built: Project) -> Project:
    """A recipe that reports what it is told to."""
    grow = built.root / "small/grow.py"
    grow.write_text(grow.read_text().replace("\n    return Staged(\n        [", EXTRA))
    built.run("build", "plant", SMALL_EXTRA="a.txt deep/er/b.txt deep/c.txt")
    return built


def folder(project: Project) -> Path:
    return project.root / "reports/tiny/plant-bloom"


def names(project: Project) -> list[str]:
    return sorted(path.relative_to(folder(project)).as_posix() for path in folder(project).rglob("*"))


def build(project: Project, extra: str = "", step: int = 3) -> str:
    text = f"[sprout]\nstep = 1\n[bloom]\nstep = {step}\n"
    (project.root / "configs/plant.toml").write_text(text)
    said = project.run("build", "plant", SMALL_EXTRA=extra).stderr
    assert json.loads((folder(project) / "metrics.json").read_text()) == {"step": step}
    return said


def test_what_an_earlier_build_wrote_goes_and_a_persons_files_stay(garden: Project) -> None:
    (folder(garden) / "deep/notes.txt").write_text("mine")
    (folder(garden) / "link").symlink_to("/nowhere")
    os.mkfifo(folder(garden) / "pipe")
    assert "kept" not in build(garden, "a.txt")
    assert names(garden) == ["a.txt", "deep", "deep/notes.txt", "link", "metrics.json", "pipe"]
    (folder(garden) / "deep/notes.txt").unlink()
    build(garden, "deep/er/b.txt", step=4)
    assert "deep/er/b.txt" in names(garden)
    assert "a.txt" not in names(garden)
    build(garden, step=5)
    assert names(garden) == ["link", "metrics.json", "pipe"]


def test_what_a_person_edited_and_the_artifact_lacks_stays_and_is_said_once(garden: Project) -> None:
    (folder(garden) / "a.txt").write_text("edited")
    said = build(garden)
    assert said.count("kept") == 1
    assert "a.txt" in said
    assert names(garden) == ["a.txt", "metrics.json"]
    assert "kept" not in build(garden, step=4)
    assert (folder(garden) / "a.txt").read_text() == "edited"


def test_what_a_person_put_where_a_report_goes_is_kept_aside(garden: Project) -> None:
    for name in ("new.txt", "other.txt"):
        (folder(garden) / name).write_text("mine")
    (folder(garden) / "tree.txt").mkdir()
    (folder(garden) / "tree.txt/mine").write_text("mine")
    (folder(garden) / "metrics.json").unlink()
    (folder(garden) / "metrics.json").symlink_to("other.txt")
    said = build(garden, "new.txt tree.txt")
    assert said.count("kept as reports/tiny/plant-bloom/") == 3
    kept = {name.partition(".changed-")[0]: folder(garden) / name for name in names(garden) if ".changed-" in name}
    assert kept["new.txt"].read_text() == "mine"
    assert os.readlink(kept["metrics.json"]) == "other.txt"
    assert any(name.startswith("tree.txt.changed-") and name.endswith("/mine") for name in names(garden))
    assert (folder(garden) / "other.txt").read_text() == "mine"


def test_a_file_becomes_a_folder_and_a_folder_a_file(garden: Project) -> None:
    assert "kept" not in build(garden, "a.txt/x")
    assert "kept" not in build(garden, "a.txt deep", step=4)
    assert names(garden) == ["a.txt", "deep", "metrics.json"]


def test_a_known_path_is_the_builds_whatever_it_says(garden: Project) -> None:
    (folder(garden) / "metrics.json").write_text("edited")
    assert "kept" not in build(garden)


def test_a_clone_with_its_reports_and_no_artifacts(garden: Project) -> None:
    """Reports that git brought are replaced though no manifest says who wrote them; others in the way are not lost."""
    garden.run("lock")
    (folder(garden) / "metrics.json").write_text('{"step": "of another make of machine"}')
    (folder(garden) / "notes.txt").write_text("mine")
    for path in (garden.store, garden.root / "weights"):
        path.rename(garden.root.parent / path.name)
    said = garden.run("build", "--all").stderr
    assert "kept" not in said
    assert json.loads((folder(garden) / "metrics.json").read_text()) == {"step": 2}
    assert (folder(garden) / "notes.txt").read_text() == "mine"


def test_without_any_earlier_build_nothing_is_replaced(project: Project) -> None:
    place = project.root / "reports/tiny/plant-bloom"
    place.mkdir(parents=True)
    (place / "metrics.json").write_text("mine")
    said = project.run("build", "--all").stderr
    assert "kept as reports/tiny/plant-bloom/metrics.json.changed-" in said
    assert [path.read_text() for path in place.glob("*.changed-*")] == ["mine"]
