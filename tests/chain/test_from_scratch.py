"""The whole chain twice from nothing, under different thread settings: every digest is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def build(folder: Path, threads: str) -> dict[str, str]:
    """Clone what git tracks, build everything in a store of its own, and return ref -> artifact."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    environment.pop("VPSTORE_ROOT", None)
    command = [sys.executable, "-m", "vpstore", "build", "--all"]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    listing = [sys.executable, "-m", "vpstore", "ls", "--json"]
    found = json.loads(subprocess.run(listing, cwd=folder, check=True, capture_output=True, text=True).stdout)
    return {f"{row['object']}@{row['stage']}": row["artifact"] for row in found["objects"]}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_builds_from_scratch_are_equal(tmp_path: Path) -> None:
    one, two = build(tmp_path / "one", "1"), build(tmp_path / "two", "7")
    locked = json.loads((ROOT / "vpstore.lock").read_text(encoding="utf-8"))["profiles"]["tiny"]
    assert one.keys() == locked.keys()
    assert one == two
