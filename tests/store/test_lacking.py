"""File systems that lack a call: reading goes on where it needs none of it, and doctor finds out by trying."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from small_project import Project

from vpstore.api import reading, signing
from vpstore.errors import VpstoreError
from vpstore.storage import system
from vpstore.storage.store import Store
from vpstore.storage.trial import try_out
from vpstore.workspace import Workspace

CALLS = {
    "flock": "locking",
    "fsync": "making durable",
    "fchmod": "changing a mode",
    "rename": "renaming",
    "mkdir": "making a folder",
    "write": "writing",
}


def lack(patch: pytest.MonkeyPatch, call: str, code: int = errno.ENOSYS) -> None:
    """As of now, no call of this kind is had."""

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code), "/somewhere")

    disk = system.Disk()
    patch.setattr(disk, call, refuse)
    patch.setattr(system, "disk", disk)


def test_a_sound_file_system_has_no_faults_and_keeps_nothing_of_the_trial(tmp_path: Path) -> None:
    assert try_out(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", CALLS)
def test_what_a_file_system_lacks_is_found_by_trying(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    lack(monkeypatch, call)
    assert any(fault.startswith(f"{CALLS[call]}: ") for fault in try_out(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_reading_needs_no_lock_and_writing_says_that_there_is_none(
    built: Project, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(built.cache))
    work = Workspace.find(built.root)
    lack(monkeypatch, "flock", code)
    assert reading.resolve("plant", work=work).path.is_dir()
    assert reading.verify(work=work, everything=True).is_ok
    assert len(reading.open("plant", work=work)) > 0
    signing.export("plant", built.root / "out", work=work)
    for act in (lambda: work.store.locks.exclusive("x"), work.store.sweeping, work.store.roots.running):
        with pytest.raises(VpstoreError) as caught, act():
            pass
        assert caught.value.next_step


def test_another_refusal_of_a_lock_is_not_taken_for_its_absence(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    lack(monkeypatch, "flock", errno.EIO)
    with pytest.raises(VpstoreError), store.changing():
        pass
