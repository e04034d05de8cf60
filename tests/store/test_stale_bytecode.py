"""Compiled modules: an edit that Python's own check cannot see still counts."""

from __future__ import annotations

import os
import subprocess
import sys

from small_project import Project


def key(project: Project) -> str:
    """The key that `build` would use, from a process of its own that may read and write compiled modules."""
    code = "from vpstore.api import building; print(building.plan('plant@sprout')[0].key)"
    variables = {name: value for name, value in project.variables().items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project.root, env=variables, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_an_edit_of_equal_size_and_time_is_a_new_key(built: Project) -> None:
    runner = built.root / "small" / "run.py"
    text = runner.read_text()
    assert "params = {}" in text
    runner.write_text(text.replace("params = {}", "params = {'kind': 1}"))
    first = key(built)
    assert list((built.root / "small" / "__pycache__").glob("run.*.pyc"))
    before = runner.stat()
    runner.write_text(runner.read_text().replace("'kind': 1", "'kind': 2"))
    os.utime(runner, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert runner.stat().st_size == before.st_size
    assert key(built) != first
