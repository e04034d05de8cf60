"""`vpstore export`: a plain directory, whole or absent."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from damage_tools import flip
from signing_tools import workspace
from small_project import Project
from test_attest_command import Failing

from vpstore.api import signing as api
from vpstore.errors import DigestMismatch, UsageError, VpstoreError
from vpstore.schema.digest import Digest
from vpstore.schema.ref import parse_ref
from vpstore.storage import atomic, system
from vpstore.verbs.export import export
from vpstore.verbs.resolve import resolve


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_export_is_the_view_in_real_files(built: Project, tmp_path: Path) -> None:
    target = tmp_path / "new" / "plant"
    done = built.run("export", "plant", str(target))
    assert done.stdout == f"{target}\n"
    view = Path(built.run("resolve", "plant").stdout.strip())
    assert contents(target) == contents(view)
    assert Digest.of((target / "artifact.json").read_bytes()) == built.json("show", "plant")["artifact"]
    for path in target.rglob("*"):
        assert not path.is_symlink()
        assert path.is_dir() or (path.stat().st_nlink == 1 and path.stat().st_mode & 0o200)
    assert os.listdir(target.parent) == ["plant"]


def test_an_export_is_independent_of_the_store(built: Project, tmp_path: Path) -> None:
    built.run("export", "plant", str(tmp_path / "plant"))
    before = built.listing()
    (tmp_path / "plant" / "model.safetensors").write_bytes(b"mine")
    assert built.listing() == before
    assert built.run("verify", "--all").stdout == "no faults in the store .vpstore\n"
    shutil.rmtree(built.store)
    assert (tmp_path / "plant" / "provenance.json").read_bytes()


def test_as_json_and_dry(built: Project, tmp_path: Path) -> None:
    document = built.json("export", "plant", str(tmp_path / "plant"), "--dry-run")
    assert (document["ref"], document["files"], document["dry_run"]) == ("plant@bloom", 4, True)
    assert not (tmp_path / "plant").exists()
    document = built.json("export", "plant", str(tmp_path / "plant"))
    assert len(contents(Path(document["path"]))) == document["files"]
    assert document["size_bytes"] == sum(map(len, contents(tmp_path / "plant").values())) - len(
        (tmp_path / "plant" / "artifact.json").read_bytes()
    )


def test_an_empty_directory_is_taken(built: Project, tmp_path: Path) -> None:
    (tmp_path / "plant").mkdir()
    built.run("export", "plant", "../plant")
    assert len(contents(tmp_path / "plant")) == 4


def test_what_is_there_is_never_overwritten(built: Project, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    view = Path(built.run("resolve", "plant").stdout.strip())
    before, around = built.listing(), contents(tmp_path / "full")
    targets = {
        tmp_path / "full": "not empty",
        tmp_path / "file": "a link or a file",
        tmp_path / "link": "a link or a file",
        tmp_path / "broken": "a link or a file",
        tmp_path / "file" / "below": "is a file",
        view: "outside the store and the views",
        view / "below": "outside the store and the views",
        built.store / "below": "outside the store and the views",
        built.root / "weights" / "other" / "below": "outside the store and the views",  # of another profile
        built.root / "weights" / "below": "outside the store and the views",
        tmp_path / ("x" * 300): "File name too long",
        Path("/proc"): "not empty",
    }
    for target, what in targets.items():
        said = built.run("export", "plant", str(target), code=2).stderr
        assert what in said, target
        assert "Traceback" not in said
    assert built.listing() == before
    assert contents(tmp_path / "full") == around
    assert (tmp_path / "file").read_text() == "mine"


def test_a_blob_that_is_damaged_behind_its_stamp_is_found_while_copying(
    built: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = workspace(built, monkeypatch)
    manifest = resolve(work, parse_ref("plant")).manifest  # whole at this moment
    flip(work.store.blobs.path(manifest.by_path["model.safetensors"].digest), -1)
    with pytest.raises(DigestMismatch, match="does not match its digest"):
        export(work, manifest, tmp_path / "plant")
    work.store.blobs.path(manifest.by_path["provenance.json"].digest).unlink()
    with pytest.raises(VpstoreError):
        export(work, manifest, tmp_path / "plant")
    assert not (tmp_path / "plant").exists()
    assert not list(tmp_path.glob(".vpstore-export-*"))


def test_exported_files_are_writable_where_bytes_are_shared(
    built: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file system clones, the copy of a read-only blob is made writable through the one door to the disk."""

    class Watched(system.Disk):
        changed: list[str] = []

        def chmod(self, path: Path, mode: int) -> None:
            self.changed.append(path.name)
            super().chmod(path, mode)

    def cloned(source: Path, target: Path) -> bool:
        shutil.copy(source, target)
        return True

    monkeypatch.setattr(atomic, "clone", cloned)
    monkeypatch.setattr(system, "disk", Watched())
    api.export("plant", tmp_path / "plant", work=workspace(built, monkeypatch))
    assert {"artifact.json", "model.safetensors"} <= set(Watched.changed)
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "plant").rglob("*"))


def test_whole_or_absent_whatever_the_disk_does(
    built: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, target = workspace(built, monkeypatch), tmp_path / "out" / "plant"
    target.parent.mkdir()
    expected = contents(Path(built.run("resolve", "plant").stdout.strip()))
    resolve(work, parse_ref("plant"))
    said: list[str] = []
    for number in range(1, 200):
        monkeypatch.setattr(system, "disk", Failing(number))
        try:
            api.export("plant", target, work=work)
        except VpstoreError as error:
            said.append(error.what)
        else:
            break
        finally:
            monkeypatch.setattr(system, "disk", system.Disk())
        if target.exists():  # the very last step, making the name durable, was the one that failed
            assert contents(target) == expected
            shutil.rmtree(target)
        assert os.listdir(target.parent) == []
    assert all("Input/output error" in what for what in said)
    assert len(said) > 10  # each file has several steps
    assert contents(target) == expected


def test_somebody_who_is_faster_keeps_what_is_theirs(
    built: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that appears in the directory between the first look and the last step."""
    work, target = workspace(built, monkeypatch), tmp_path / "plant"

    class Meanwhile(system.Disk):
        def rename(self, source: Path, to: Path) -> None:
            if to == target and not target.exists():
                target.mkdir()
                (target / "theirs").write_text("theirs")
            super().rename(source, to)

    monkeypatch.setattr(system, "disk", Meanwhile())
    with pytest.raises(UsageError, match="meanwhile"):
        api.export("plant", target, work=work)
    assert contents(target) == {"theirs": b"theirs"}
    assert not list(tmp_path.glob(".vpstore-export-*"))
