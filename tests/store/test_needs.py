"""What a build takes is said before its recipe runs, and a disk that is too full is refused then."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from small_project import Project

from vpstore import needs
from vpstore.errors import VpstoreError
from vpstore.narration import Silent
from vpstore.runner import Needs
from vpstore.schema.ref import StageRef
from vpstore.workspace import Workspace

REF = StageRef("plant", "sprout")
SAYS = """

def needs(prepared, inputs, scratch):
    from vpstore.runner import Needs
    return Needs(disk_bytes=10**18, memory_bytes=1)
"""


class Usage(NamedTuple):
    """What `shutil.disk_usage` gives."""

    total: int
    used: int
    free: int


class Notes(Silent):
    """Keeps the notes, too."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Keep it."""
        self.notes.append(text)


def test_disk_and_memory_are_said_and_little_memory_is_warned_of(
    built: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    notes = Notes()
    work = Workspace.find(built.root, narrator=notes)
    monkeypatch.setattr(needs, "available_memory", lambda: 4 << 30)
    needs.say(work, REF, Needs(disk_bytes=12_050_000, memory_bytes=3 << 30), tmp_path)
    assert notes.notes == ["plant@sprout: takes 0.01 GB of disk and at most about 3.0 GiB of memory"]
    assert notes.warnings == []
    needs.say(work, REF, Needs(disk_bytes=0, memory_bytes=5 << 30), tmp_path)
    [warning] = notes.warnings
    assert "5.0 GiB of memory; 4.0 are available" in warning


def test_what_an_earlier_build_left_counts_as_free(
    built: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    work = Workspace.find(built.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 1 << 20))
    wanted = Needs(disk_bytes=8 << 20, memory_bytes=0)
    with pytest.raises(VpstoreError, match="too full"):
        needs.say(work, REF, wanted, tmp_path)
    (tmp_path / "left").write_bytes(bytes(8 << 20))
    needs.say(work, REF, wanted, tmp_path)


def test_a_full_disk_is_refused_before_the_recipe_runs(built: Project) -> None:
    runner = built.root / "small/run.py"
    runner.write_text(runner.read_text() + SAYS)
    before = built.listing()
    done = built.run("build", "plant@sprout", "--force", code=1)
    assert "the disk is too full for this build" in done.stderr
    assert "1,000,000,000,000,000,000 bytes free" in done.stderr
    assert built.listing() == before


def test_available_memory_is_what_the_system_says_or_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 10 kB\nMemAvailable:     7 kB\n")
    monkeypatch.setattr(needs, "_MEMORY", tmp_path / "meminfo")
    assert needs.available_memory() == 7 * 1024
    monkeypatch.setattr(needs, "_MEMORY", tmp_path / "absent")
    assert needs.available_memory() is None
