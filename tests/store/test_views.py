"""Views: whatever lies in the place of one, or in one, and was not made by vpstore is kept and said, never dropped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_project import Project


def view_of(project: Project) -> Path:
    return Path(project.json("resolve", "plant")["path"])


def kept_of(view: Path) -> list[Path]:
    return [path for path in view.parent.iterdir() if ".changed-" in path.name]


def a_file(place: Path) -> None:
    place.write_text("my precious notes")


def a_pipe(place: Path) -> None:
    os.mkfifo(place)


def a_link(place: Path) -> None:
    place.symlink_to("/tmp")


def a_dangling_link(place: Path) -> None:
    place.symlink_to("nowhere")


def a_folder(place: Path) -> None:
    place.mkdir()
    (place / "notes.txt").write_text("my precious notes")


Put = Callable[[Path], None]


def told(place: Path) -> tuple[int, str]:
    """The kind of what lies somewhere, and what it says."""
    kind = place.lstat().st_mode
    if place.is_symlink():
        return kind, os.readlink(place)
    if place.is_dir():
        return kind, (place / "notes.txt").read_text()
    return kind, place.read_text() if place.is_file() else ""


@pytest.mark.parametrize("put", [a_file, a_pipe, a_link, a_dangling_link, a_folder])
def test_what_lies_in_the_place_of_a_view_is_kept(built: Project, put: Put) -> None:
    view = view_of(built)
    shutil.rmtree(view)
    put(view)
    before = told(view)
    assert len(built.json("verify", "plant", code=3)["faults"]) == (1 if put is not a_folder else 5)
    done = built.run("resolve", "plant")
    (kept,) = kept_of(view)
    assert told(kept) == before
    assert f"kept as {kept.relative_to(built.root)}" in done.stderr
    assert (view / "model.safetensors").is_file()
    built.run("verify", "plant")
    built.run("resolve", "plant")
    assert kept_of(view) == [kept]


@pytest.mark.parametrize("put", [a_file, a_pipe, a_link, a_dangling_link, a_folder])
@pytest.mark.parametrize("name", ["mine", "reports/mine", "model.safetensors"])
def test_what_was_put_into_a_view_is_kept(built: Project, put: Put, name: str) -> None:
    view = view_of(built)
    (view / name).unlink(missing_ok=True)
    put(view / name)
    before = told(view / name)
    assert built.json("verify", "plant", code=3)["faults"]
    assert "a view was changed" in built.run("resolve", "plant").stderr
    (kept,) = kept_of(view)
    assert told(kept / name) == before
    built.run("verify", "plant")


def test_a_link_to_the_same_blob_under_another_name_is_kept(built: Project) -> None:
    """Vpstore makes no such name: whoever made it wants it."""
    view = view_of(built)
    (view / "best.safetensors").symlink_to(os.readlink(view / "model.safetensors"))
    built.run("resolve", "plant")
    assert len(kept_of(view)) == 1


def test_links_into_a_store_that_was_moved_are_made_anew_without_a_word(built: Project) -> None:
    view = view_of(built)
    for path in [path for path in view.rglob("*") if path.is_symlink()]:
        digits = os.readlink(path).rpartition("/blobs/")[2]
        path.unlink()
        path.symlink_to(f"/elsewhere/.vpstore/blobs/{digits}")
    done = built.run("resolve", "plant")
    assert done.stderr == ""
    assert kept_of(view) == []
    built.run("verify", "plant")


@pytest.mark.parametrize("put", [a_file, a_pipe, a_link, a_folder])
def test_what_lies_in_the_place_of_the_attestations_is_kept(built: Project, put: Put) -> None:
    view = view_of(built)
    lines = view.with_name(f"{view.name}.intoto.jsonl")
    whole = lines.read_bytes()
    lines.unlink()
    put(lines)
    before = told(lines)
    assert "kept as" in built.run("resolve", "plant").stderr
    (kept,) = kept_of(view)
    assert told(kept) == before
    assert lines.read_bytes() == whole
    built.run("gc", "--dry-run")


def test_the_last_copy_of_an_attestation_stays_beside_the_view(built: Project) -> None:
    view = view_of(built)
    path = view.with_name(f"{view.name}.intoto.jsonl")
    lines = path.read_bytes()
    shutil.rmtree(built.store / "attestations")
    for _ in range(2):
        built.run("resolve", "plant")
        assert (path.read_bytes(), kept_of(view)) == (lines, [])


def test_attestations_of_another_store_make_no_pile(built: Project, tmp_path: Path) -> None:
    """One artifact, built in two stores in turn: each has its own attestations, and nothing is a person's."""
    view = view_of(built)
    other = {"VPSTORE_ROOT": str(tmp_path / "other")}
    built.run("build", "--all", **other)
    for more in (other, {}, other, {}):
        assert "kept as" not in built.run("resolve", "plant", **more).stderr
    assert kept_of(view) == []
