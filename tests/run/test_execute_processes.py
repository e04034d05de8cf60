"""recipes/execute.py as a process among processes: its memory, its workers' deaths and its own, its numerics."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from execute_children import ROOT, computed, finish, is_running, start, wait_until

TENSOR_MIB = 20
TENSORS = 20


@pytest.mark.slow
def test_a_plan_needs_the_memory_of_a_few_tensors(tmp_path: Path) -> None:
    lean, hoard = json.loads(finish(start("memory", tmp_path, TENSORS, TENSOR_MIB)))
    shutil.rmtree(tmp_path)
    assert lean < 8 * (TENSOR_MIB << 20)  # three or four, and what the allocator keeps
    assert hoard > 15 * (TENSOR_MIB << 20)  # else the measure would see nothing


@pytest.mark.slow
def test_the_workers_of_a_killed_build_end_with_it(tmp_path: Path) -> None:
    process = start("wait", tmp_path, VPSTORE_WORKERS="2")
    log = tmp_path / "wait"
    wait_until(lambda: (log / "computed.log").exists() and len(computed(log)) == 3, "both workers at work")
    pids = {pid for pid, _ in computed(log)[1:]}
    assert len(pids - {process.pid}) == 2
    assert all(is_running(pid) for pid in pids)
    process.kill()
    wait_until(lambda: not any(is_running(pid) for pid in pids), "the workers ended")
    process.communicate()


NUMERICS = """
import json, sys
sys.path.insert(0, {root!r})
from recipes import runtime
from recipes.job import Job
from vpstore.errors import VpstoreError
{first}
try:
    {second}
except VpstoreError as error:
    print(json.dumps([type(error).__name__, error.exit_code, error.where, error.found, error.next_step]))
"""
JOB = "Job('recipes.expand_depth', {{}}, {threads}, {{}}, {{}}, None).recipe()"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "found"),
    [
        (JOB.format(threads=1), "torch in memory, threads fixed as [1]"),
        ("import torch", "torch in memory, threads fixed as never"),
    ],
    ids=["fixed", "torch"],
)
def test_other_threads_in_one_process_are_refused(first: str, found: str) -> None:
    code = NUMERICS.format(root=str(ROOT), first=first, second=JOB.format(threads=2))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    name, exit_code, where, said, next_step = json.loads(done.stdout)
    assert (name, exit_code, where, said) == ("VpstoreError", 1, "recipes/runtime.py", found)
    assert "separate processes" in next_step
