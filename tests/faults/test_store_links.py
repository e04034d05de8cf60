"""Links, pipes and folders where a store has files: nothing is read through them, nothing is written through them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage_tools import file_of, shown
from disk_matrix import set_step
from small_project import Project


def shard_blob(project: Project) -> Path:
    return project.blob(file_of(shown(project), "model.safetensors")["digest"])


def link(path: Path, target: Path) -> None:
    path.symlink_to(target, target_is_directory=target.is_dir())


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_a_blob_that_is_a_link_is_no_blob(built: Project, tmp_path: Path) -> None:
    """Its bytes are right, but they are somebody else's to change."""
    blob, outside = shard_blob(built), tmp_path / "outside"
    data = blob.read_bytes()
    shutil.move(blob, outside)
    link(blob, outside)
    assert "a symbolic link" in built.run("resolve", "plant", code=13).stderr
    assert [fault["found"] for fault in built.json("verify", "plant", code=3)["faults"]] == ["a symbolic link"]
    assert any("stray" in fault["found"] for fault in built.json("verify", "--all", code=3)["faults"])
    assert not built.json("build", "plant")["builds"][0]["cached"]
    assert (blob.read_bytes(), blob.is_symlink()) == (data, False)
    assert outside.read_bytes() == data
    built.run("verify", "--all")


def test_a_blob_folder_that_is_a_link_is_not_used(built: Project, tmp_path: Path) -> None:
    blob, outside = shard_blob(built), tmp_path / "outside"
    shutil.move(blob.parent, outside)
    link(blob.parent, outside)
    before = contents(outside)
    assert "symbolic link" in built.run("resolve", "plant", code=13).stderr
    assert any("symbolic link" in fault["found"] for fault in built.json("verify", "plant", code=3)["faults"])
    refused = built.run("build", "plant", code=1).stderr
    assert "a folder of the store is a symbolic link" in refused
    assert "next" in refused
    assert contents(outside) == before


def no_file(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def broken(path: Path) -> None:
    path.symlink_to("nowhere")


def circle(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.timeout(60)  # whoever opens a pipe without a writer waits for ever
@pytest.mark.parametrize("odd", [no_file, pipe, broken, circle])
@pytest.mark.parametrize("part", ["shard", "manifest"])
def test_what_is_no_file_is_refused_at_once(built: Project, odd: Callable[[Path], None], part: str) -> None:
    blob = shard_blob(built) if part == "shard" else built.blob(shown(built)["artifact"])
    blob.unlink()
    odd(blob)
    assert "Traceback" not in built.run("resolve", "plant", code=13).stderr
    assert built.json("verify", "plant", code=3)["faults"]
    assert built.json("verify", "--all", code=3)["faults"]


def folder_of_key(document: Any) -> str:
    return f"keys/{document['key'][7:9]}/{document['key'][7:]}"


def folder_of_attestations(document: Any) -> str:
    return f"attestations/{document['artifact'][7:]}"


@pytest.mark.parametrize("place", [folder_of_key, folder_of_attestations])
def test_nothing_is_written_below_a_link(built: Project, tmp_path: Path, place: Callable[[Any], str]) -> None:
    folder = built.store / place(shown(built))
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.rmtree(folder)
    link(folder, outside)
    assert "a folder of the store is a symbolic link" in built.run("build", "plant", "--force", code=1).stderr
    assert list(outside.iterdir()) == []
    folder.unlink()
    built.run("build", "plant", "--force")
    built.run("verify", "--all")


@pytest.mark.parametrize("place", [folder_of_key, folder_of_attestations])
def test_a_claim_that_is_a_link_is_replaced_not_written_through(
    built: Project, tmp_path: Path, place: Callable[[Any], str]
) -> None:
    path = next((built.store / place(shown(built))).iterdir())
    outside = tmp_path / "outside"
    outside.write_text("mine")
    path.unlink()
    link(path, outside)
    assert built.json("verify", "plant", code=3)["faults"]
    built.run("build", "plant", "--force")
    assert outside.read_text() == "mine"


def test_a_lock_that_is_a_link_creates_nothing_elsewhere(built: Project, tmp_path: Path) -> None:
    set_step(built.root, 7)
    key = built.json("build", "plant@sprout", "--dry-run")["builds"][0]["key"]
    link(built.store / "locks" / f"{key[7:]}.lock", tmp_path / "made")
    refused = built.run("build", "plant@sprout", code=1).stderr
    assert "Traceback" not in refused
    assert not (tmp_path / "made").exists()


def test_a_scratch_folder_that_is_a_link_is_not_worked_in(built: Project, tmp_path: Path) -> None:
    set_step(built.root, 7)
    key = built.json("build", "plant@sprout", "--dry-run")["builds"][0]["key"]
    outside = tmp_path / "outside"
    outside.mkdir()
    link(built.store / "work" / key[7:], outside)
    assert "a folder of the store is a symbolic link" in built.run("build", "plant@sprout", code=1).stderr
    assert list(outside.iterdir()) == []


def test_a_pointer_that_is_a_link_is_replaced(built: Project, tmp_path: Path) -> None:
    pointer, outside = built.pointer("plant-sprout"), tmp_path / "outside"
    text = pointer.read_text()
    outside.write_text(text)
    pointer.unlink()
    link(pointer, outside)
    built.run("resolve", "plant@sprout")  # a pointer is judged by what it says
    set_step(built.root, 7)
    built.run("build", "plant@sprout")
    assert outside.read_text() == text
    assert json.loads(pointer.read_text())["content"] != json.loads(text)["content"]


PARTS = ("blobs", "blobs/blake3", "keys", "attestations", "roots", "roots/running", "tmp", "tmp/partial", "locks",
         "quarantine", "work")  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_store_that_is_a_link_is_nobodys_place_to_write_or_delete_in(
    built: Project, tmp_path: Path, part: str
) -> None:
    """git may bring a store with its links; what they lead to is a person's."""
    folder, outside = built.store / part, tmp_path / "outside"
    folder.mkdir(exist_ok=True)
    shutil.move(folder, outside)
    (outside / "mine.json").write_text("mine")
    link(folder, outside)
    before = contents(outside)
    for command in ("build plant --force", "gc --grace 0"):
        said = built.run(*command.split(), code=1).stderr
        assert "a folder of the store is a symbolic link" in said
        assert f"where     {folder}\n" in said
    assert contents(outside) == before
    assert "symbolic link" in built.outcome("doctor").stdout


def test_a_store_that_is_a_link_as_a_whole_is_the_owners_choice(built: Project, tmp_path: Path) -> None:
    shutil.move(built.store, tmp_path / "large-disk")
    link(built.store, tmp_path / "large-disk")
    for row in built.json("ls")["objects"]:
        built.run("resolve", f"{row['object']}@{row['stage']}", "--full")  # views lead to where the store is now
    built.run("verify", "--all")
    built.run("build", "plant", "--force")
