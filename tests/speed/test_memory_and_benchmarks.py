"""Memory does not grow with the size of a blob, and the benchmark runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_project import REPOSITORY

from benchmarks import run
from benchmarks.measures import MIB, figure, peaks
from benchmarks.projects import Place

GROWTH = 16 * MIB  # allocators differ from run to run; the large blob is 160 MiB larger than the small one


@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_larger_blob_needs_no_more_memory(tmp_path: Path, shared: bool) -> None:
    place = Place(tmp_path)
    small, large = (peaks(place, size * MIB, shared=shared) for size in (48, 208))
    assert small.keys() == large.keys()
    for name, peak in large.items():
        assert peak - small[name] < GROWTH, f"{name}: {small[name] / MIB:.0f} -> {peak / MIB:.0f} MiB"


def test_a_figure_is_held_to_its_aim() -> None:
    assert figure("ratio", 4.0, ">= 4").is_met
    assert figure("ratio", 3.99, ">= 4").is_met is False
    assert figure("time", 0.2, "<= 0.2", unit="s").is_met
    assert figure("time", 0.21, "<= 0.2", unit="s").is_met is False
    assert figure("told", 1.0, "").is_met is None


def test_the_table_goes_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{run.BEGIN}\nold\n{run.END}\nafter\n")
    run.rewrite(page, "new\n")
    assert page.read_text() == f"before\n{run.BEGIN}\nnew\n{run.END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(SystemExit):
        run.rewrite(page, "new\n")


def test_the_page_has_the_marks() -> None:
    text = run.PAGE.read_text()
    assert text.index(run.BEGIN) < text.index(run.END)


@pytest.mark.slow
def test_the_whole_benchmark_runs_in_small(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks.run", "--quick", "--output", str(output)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    found = {row["name"].split(",")[0].split(":")[0] for row in json.loads(output.read_text())["figures"]}
    assert {"ingest", "verified pull", "push", "verify --full"} <= found
