"""The same faults from the kernel's side: strace kills or refuses at the n-th system call of the real program."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from damage_tools import file_of, shown
from small_project import Project
from strace_faults import SCENES, SHORT, STRACE, Injection, fresh_copy, inject, places

pytestmark = pytest.mark.skipif(STRACE is None, reason="needs strace")


@pytest.mark.parametrize("injection", SHORT, ids=str)
def test_a_refusal_of_the_kernel_loses_nothing(built: Project, injection: Injection) -> None:
    assert inject(built, injection) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("scene", SCENES)
def test_many_refusals_of_the_kernel_lose_nothing(template: Project, tmp_path: Path, scene: str) -> None:
    wrong = []
    for number, injection in enumerate(places(template, tmp_path / "counted", scene)):
        wrong += inject(fresh_copy(template, tmp_path / str(number)), injection)
        shutil.rmtree(tmp_path / str(number))
    assert wrong == []


def test_an_injection_that_never_takes_place_is_said(built: Project) -> None:
    assert "it never took place" in inject(built, Injection("rename", "error=EIO", 4000, "pointer"))[0]


@pytest.mark.parametrize(("command", "code"), [(["resolve", "plant", "--full"], 13), (["verify", "plant"], 3)])
def test_a_blob_that_the_disk_cannot_read_is_said(built: Project, command: list[str], code: int) -> None:
    """EIO at the first byte of one blob."""
    blob = built.blob(file_of(shown(built), "reports/metrics.json")["digest"])
    calls = "read,pread64,readv,preadv,preadv2,madvise"
    done = subprocess.run(
        [str(STRACE), "-f", "-qq", "-o", "/dev/null", "-P", str(blob), "-e", f"trace={calls}", "-e",
         f"inject={calls}:error=EIO", *built.command(*command)],
        cwd=built.root, env=built.variables(), text=True, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == code, done
    assert "Input/output error" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
