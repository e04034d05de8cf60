"""Names from outside: none leads out of its folder, none means another file elsewhere, and cycles end."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import hostile_names as names
import pytest
from hypothesis import given
from hypothesis import strategies as st
from parsers import _manifest
from small_project import Project

from vpstore.errors import BadManifest, UsageError
from vpstore.lineage import walk
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import InputRecord, Manifest
from vpstore.schema.paths import check_path, fold
from vpstore.sharing.plan import gather


@pytest.mark.parametrize("place", names.PATH_PLACES)
def test_no_place_takes_a_path_that_leads_elsewhere(place: str) -> None:
    assert names.accepted(names.PATH_PLACES[place], names.PATHS) == []


@pytest.mark.parametrize("place", names.NAME_PLACES)
def test_no_place_takes_a_name_that_is_none(place: str) -> None:
    assert names.accepted(names.NAME_PLACES[place], names.NAMES) == []


def test_plain_names_stay_possible() -> None:
    assert names.accepted(lambda name: check_path(name, where="test"), names.FINE) == list(names.FINE)


@pytest.mark.parametrize(("first", "second"), names.COLLISIONS, ids=ascii)
def test_paths_that_some_file_system_takes_for_one_collide(first: str, second: str) -> None:
    assert names.colliding(first, second)
    assert names.colliding(second, first)


def test_refs_and_remote_names() -> None:
    assert names.accepted_refs() == []
    assert names.accepted_remote_names() == []


@given(st.text(max_size=40))
def test_an_accepted_path_stays_below_its_folder(text: str) -> None:
    try:
        path = check_path(text, where="test")
    except BadManifest:
        return
    assert os.path.normpath(os.path.join("/view", path)) == f"/view/{path}"
    assert fold(fold(path)) == fold(path)


@pytest.mark.parametrize("profile", ["../x", "/etc", "a/b", "", "a\\b", "tiny\n", "\u00e9"])
def test_a_profile_is_a_name(built: Project, profile: str) -> None:
    if not profile:
        built.run("ls", "--profile", profile)  # none given: params.yaml decides
    else:
        assert "Traceback" not in built.run("ls", "--profile", profile, code=2).stderr


@pytest.mark.parametrize("folder", [b"caf\xe9", "日本 語\n".encode()])
def test_a_checkout_may_lie_under_any_name(built: Project, tmp_path: Path, folder: bytes) -> None:
    """File names are bytes: also what is not UTF-8 can be registered, shown and verified."""
    root = Path(os.fsdecode(bytes(tmp_path) + b"/" + folder))
    shutil.copytree(built.root, root / "checkout", symlinks=True)
    moved = Project(root / "checkout", tmp_path / "cache2")
    for command in (["build", "plant"], ["show", "plant"], ["verify", "--all"], ["ls"]):
        assert "Traceback" not in moved.run(*command).stderr
    assert os.fsencode(moved.json("resolve", "plant")["path"]).startswith(bytes(root))
    for locale in ("C", "C.UTF-8") if folder == b"caf\xe9" else ():
        variables = moved.variables(LC_ALL=locale, PYTHONUTF8="0")
        done = subprocess.run(moved.command("resolve", "plant"), cwd=moved.root, env=variables, capture_output=True)
        assert (Path(os.fsdecode(done.stdout.removesuffix(b"\n"))) / "model.safetensors").is_file(), done


def test_an_output_that_is_full_is_said(built: Project) -> None:
    for arguments in (["ls"], ["resolve", "plant"], ["resolve", "plant", "--json"], ["verify"]):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                built.command(*arguments), cwd=built.root, env=built.variables(), stdout=full, stderr=subprocess.PIPE
            )
        assert done.returncode == 1
        assert b"cannot be written: No space left" in done.stderr
        assert b"Traceback" not in done.stderr


class Circle:
    """A store whose manifests name one another; digests make that infeasible, a forger's store may say so."""

    def __init__(self, length: int, *, closed: bool) -> None:
        self.length, self.closed = length, closed

    def manifest(self, artifact: Digest, *, what: str = "") -> Manifest:
        number = int(artifact.hex, 16)
        after = (number + 1) % self.length if self.closed else number + 1
        base = _manifest()
        parent = InputRecord("parent", Digest.from_hex(f"{after:064x}"), Digest.of(b"content"))
        record = type(base.build)(base.build.entry, base.build.recipe_files, base.build.params, (parent,))
        return Manifest(base.object, base.stage, record, base.files)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_a_walk_round_a_circle_ends(length: int) -> None:
    start = Digest.from_hex(f"{0:064x}")
    circle = Circle(length, closed=True)
    assert len(walk(circle, start).nodes) == length
    assert len(gather({start: "start"}, lambda artifact, label: circle.manifest(artifact)).manifests) == length


def test_a_walk_without_end_is_given_up() -> None:
    start = Digest.from_hex(f"{0:064x}")
    endless = Circle(0, closed=False)
    assert len(walk(endless, start, limit=300).nodes) <= 301
    with pytest.raises(BadManifest):
        gather({start: "start"}, lambda artifact, label: endless.manifest(artifact))


def test_inputs_of_objects_toml_form_no_circle(built: Project) -> None:
    objects = built.root / "configs" / "objects.toml"
    objects.write_text(
        objects.read_text().replace('inputs = { parent = "seed" }', 'inputs = { parent = "plant@bloom" }')
    )
    for command in (["build", "plant"], ["ls"], ["verify"], ["resolve", "plant"]):
        assert "circle" in built.run(*command, code=UsageError.exit_code).stderr
