from __future__ import annotations

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

from recipes.run import _sources

ROOT = Path(__file__).parents[2]


def test_what_is_pinned_is_what_a_build_reads(tmp_path: Path) -> None:
    (tmp_path / "configs/upcycle/provenance").mkdir(parents=True)
    folder = tmp_path / "data/synth"
    (folder / "part").mkdir(parents=True)
    for name in ("b.parquet", "a.parquet", "part/c.parquet", "notes.txt"):
        (folder / name).write_text(name)
    about = ["--origin", "here", "--revision", "1", "--license", "MIT"]
    start = [sys.executable, "-m", "tools.pin_sources", "synth", *about, "--root", "data/synth", "--glob"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*start, "**/*.parquet"], cwd=tmp_path, check=True, env=environment, stdout=subprocess.DEVNULL)
    found = _sources(tmp_path, "synth", "configs/upcycle/provenance/synth.json")
    assert [source.role for source in found] == ["synth/a.parquet", "synth/b.parquet", "synth/part/c.parquet"]
    for source in found:
        data = source.path.read_bytes()
        assert source.sha256 == sha256(data).hexdigest()
        assert source.size_bytes == len(data)
    done = subprocess.run(
        [*start, "*.none"], cwd=tmp_path, check=False, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no file matches" in done.stderr
    assert json.loads((tmp_path / "configs/upcycle/provenance/synth.json").read_text())["license"] == "MIT"
