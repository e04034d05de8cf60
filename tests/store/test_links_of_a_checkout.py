"""Folders and files of a checkout that are symbolic links, as git keeps them and people make them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_project import Project, pointed
from test_stale_bytecode import key


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def lead_out(project: Project, name: str) -> Path:
    """Put a link in the place of a folder, to a person's folder with all that was there, and more."""
    link, outside = project.root / name, project.root.parent / "outside"
    shutil.copytree(link, outside, symlinks=True)
    shutil.rmtree(link)
    link.symlink_to(outside)
    for folder in [outside, *(path for path in sorted(outside.rglob("*")) if path.is_dir())]:
        (folder / "thesis.txt").write_text("precious")
    return outside


def change(project: Project, step: int) -> None:
    (project.root / "configs/plant.toml").write_text(f"[sprout]\nstep = 1\n[bloom]\nstep = {step}\n")


@pytest.mark.parametrize("name", ["reports", "reports/tiny", "reports/tiny/plant-bloom"])
def test_reports_are_not_written_through_a_link_that_leads_out(built: Project, name: str) -> None:
    outside = lead_out(built, name)
    before, pointer = contents(outside), built.pointer("plant-bloom").read_bytes()
    change(built, 7)
    for _ in ("recipe", "cache hit"):
        said = built.run("build", "plant", code=1).stderr
        assert f"where     {built.root / name}\n" in said
        assert f"found     a link to {outside}" in said
        assert "[tool.vpstore]" in said
        assert contents(outside) == before
        assert built.pointer("plant-bloom").read_bytes() == pointer
    (built.root / name).unlink()
    assert built.json("build", "plant")["builds"][0]["cached"]


@pytest.mark.parametrize("name", ["weights", "weights/tiny", "weights/tiny/refs"])
def test_pointers_views_and_locks_are_not_written_through_a_link_that_leads_out(built: Project, name: str) -> None:
    shutil.rmtree(next((built.root / "weights/tiny").glob("plant@bloom-????????????")))
    outside = lead_out(built, name)
    before = contents(outside)
    change(built, 7)
    commands = [("build", "plant")]
    commands += [] if name == "weights/tiny/refs" else [("resolve", "plant")]
    commands += [("lock",)] if name == "weights" else []
    for command in commands:
        said = built.run(*command, code=1).stderr
        assert f"where     {built.root / name}\n" in said
        assert contents(outside) == before


def test_a_shared_store_knows_no_checkout_by_a_file_outside_it(built: Project, tmp_path: Path) -> None:
    shutil.move(built.store, tmp_path / "shared")
    outside = lead_out(built, "weights")
    before = contents(outside)
    built.run("resolve", "plant", code=1, VPSTORE_ROOT=str(tmp_path / "shared"))
    assert contents(outside) == before


def git(project: Project, *arguments: str) -> None:
    """As somebody whose own configuration is not asked."""
    variables = {**project.variables(), "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    subprocess.run(["git", *arguments], cwd=project.root, env=variables, check=True, capture_output=True)


def test_ones_own_weights_may_lie_on_another_disk(built: Project, tmp_path: Path) -> None:
    """If git has no such link, and the folder is nothing else."""
    git(built, "init", "-q")
    disk, weights = tmp_path / "disk", built.root / "weights"
    shutil.move(weights, disk)
    weights.symlink_to(disk)
    change(built, 7)
    built.run("build", "plant")
    built.run("lock")
    assert pointed(disk / "tiny/refs/plant-bloom.json")["artifact"]
    built.run("resolve", "plant", "--locked")
    built.run("verify", "plant")
    git(built, "add", "-f", "weights")
    before = contents(disk)
    for command in ("lock", "resolve plant", "build plant"):
        assert f"where     {weights}\n" in built.run(*command.split(), code=1).stderr
    assert contents(disk) == before
    git(built, "rm", "-q", "--cached", "weights")
    (disk / "tiny/refs").rename(disk / "tiny/other")  # nothing says that this folder is for weights
    before = contents(disk)
    built.run("build", "seed", code=1)
    assert contents(disk) == before
    weights.unlink()
    weights.symlink_to(tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    built.run("build", "--all")
    built.run("verify", "--all")
    shutil.move(tmp_path / "empty/tiny/refs", tmp_path / "refs")  # below it, no link leads out of it
    (tmp_path / "empty/tiny/refs").symlink_to(tmp_path / "refs")
    change(built, 8)
    before = contents(tmp_path / "refs")
    assert f"where     {weights / 'tiny/refs'}\n" in built.run("build", "plant", code=1).stderr
    assert contents(tmp_path / "refs") == before


def test_links_that_stay_inside_are_followed(built: Project) -> None:
    built.run("lock")
    for name in ("weights", "reports", "vpstore.lock"):
        os.rename(built.root / name, built.root / f"assets/{name}")
    (built.root / "weights").symlink_to(built.root / "assets/weights")
    (built.root / "reports").symlink_to("assets/reports")
    (built.root / "vpstore.lock").symlink_to("./assets/vpstore.lock")
    change(built, 7)
    built.run("build", "--all")
    built.run("lock")
    assert all((built.root / name).is_symlink() for name in ("weights", "reports", "vpstore.lock"))
    assert json.loads((built.root / "assets/reports/tiny/plant-bloom/metrics.json").read_text()) == {"step": 7}
    row = built.json("resolve", "plant", "--locked")
    assert (Path(row["path"]) / "model.safetensors").stat().st_size
    built.run("verify", "--all")


def test_the_lock_and_the_pipeline_are_not_written_through_a_link(built: Project, tmp_path: Path) -> None:
    built.run("lock", "plant@bloom")
    outside = tmp_path / "outside"
    shutil.move(built.root / "vpstore.lock", outside)
    (built.root / "vpstore.lock").symlink_to(outside)
    (built.root / "dvc.yaml").symlink_to(tmp_path / "nowhere")
    run = built.root / "small/run.py"
    run.write_text(run.read_text() + "\n\ndef param_keys(checkout, object, stage):\n    return {}\n")
    before = outside.read_bytes()
    for command, name in ((("lock",), "vpstore.lock"), (("pipeline", "--write"), "dvc.yaml")):
        assert f"where     {built.root / name}\n" in built.run(*command, code=1).stderr
        assert (built.root / name).is_symlink()
    assert outside.read_bytes() == before
    assert not (tmp_path / "nowhere").exists()


def test_the_store_may_be_a_link(built: Project, tmp_path: Path) -> None:
    shutil.move(built.store, tmp_path / "store")
    built.store.symlink_to(tmp_path / "store")
    change(built, 7)
    built.run("build", "--all")
    assert built.store.is_symlink()
    built.run("verify", "--all")


def test_a_store_that_is_a_link_to_nothing(project: Project, tmp_path: Path) -> None:
    project.store.symlink_to(tmp_path / "nowhere")
    for command in ("build seed", "pull", "ls"):
        assert "next      " in project.run(*command.split(), code=10).stderr
    assert not (tmp_path / "nowhere").exists()


def test_compiled_modules_outside_are_neither_removed_nor_used(built: Project, tmp_path: Path) -> None:
    """An edit of equal size and time still is a new key: as if they were not there."""
    run, outside = built.root / "small/run.py", tmp_path / "outside"
    run.write_text(run.read_text().replace("params = {}", "params = {'kind': 1}"))
    first = key(built)
    shutil.move(built.root / "small/__pycache__", outside)
    (built.root / "small/__pycache__").symlink_to(outside)
    assert (outside / f"run.{sys.implementation.cache_tag}.pyc").exists()
    before, times = contents(outside), run.stat()
    run.write_text(run.read_text().replace("'kind': 1", "'kind': 2"))
    os.utime(run, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert key(built) != first
    assert contents(outside) == before


@pytest.mark.parametrize("place", ["outside", "git"])
def test_python_keeps_nothing_compiled_through_a_link(built: Project, tmp_path: Path, place: str) -> None:
    """It follows links of its own accord; where one leads out, or to git, it is told to keep nothing."""
    outside = tmp_path / "outside" if place == "outside" else built.root / ".git"
    outside.mkdir()
    shutil.rmtree(built.root / "small/__pycache__", ignore_errors=True)
    (built.root / "small/__pycache__").symlink_to(outside)
    variables = {name: value for name, value in built.variables().items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        built.command("build", "plant"), cwd=built.root, env=variables, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not any(outside.iterdir())


@pytest.mark.parametrize("name", [".git", ".dvc", ".vpstore", ".GIT"])
def test_no_configuration_puts_reports_where_another_program_writes(built: Project, name: str) -> None:
    (built.root / name).mkdir(exist_ok=True)
    file = built.root / "pyproject.toml"
    file.write_text(file.read_text().replace('reports = "reports"', f'reports = "{name}/sub"'))
    before = contents(built.root / name)
    said = built.outcome("build", "plant")
    assert said.returncode == 1
    assert "another program" in said.stderr
    assert contents(built.root / name).keys() - before.keys() <= {
        path for path in contents(built.root / name) if "/sub" not in path
    }


def test_gc_removes_nothing_behind_a_link_to_another_store(built: Project, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(built.store, other)
    for part in ("keys", "attestations"):
        shutil.rmtree(built.store / part)
        (built.store / part).mkdir()
        for inner in (other / part).iterdir():
            (built.store / part / inner.name).symlink_to(inner)
    before = contents(other)
    built.outcome("gc", "--grace", "0")
    assert contents(other) == before
