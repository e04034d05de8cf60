"""`vpstore export --check`: a folder against its record, and against a fresh export."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from signing_tools import workspace
from small_project import Project

from vpstore.api import signing as api
from vpstore.errors import BadManifest, UsageError
from vpstore.schema.digest import Digest
from vpstore.schema.export_record import RECORD_FILE, ExportRecord
from vpstore.schema.ref import StageRef
from vpstore.workspace import Workspace

EXPORTER = """

def exporters():
    return {"list": "names of the files"}


def export(target, source, folder, progress):
    (folder / "sub").mkdir()
    (folder / "sub" / "names").write_text("\\n".join(sorted(path.name for path in source.path.iterdir())))
    (folder / "copy").write_bytes((source.path / "model.safetensors").read_bytes())
"""


def runner_modules() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "small"}


@pytest.fixture
def work(built: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    """A project with a format of its own; its runner is imported anew, as this process may know another project's."""
    run = built.root / "small" / "run.py"
    if EXPORTER not in run.read_text():
        run.write_text(run.read_text() + EXPORTER)
    others = runner_modules()
    for name in others:
        del sys.modules[name]
    yield workspace(built, monkeypatch)
    for name in runner_modules():
        del sys.modules[name]
    sys.modules.update(others)


@pytest.fixture(params=["dir", "list"])
def folder(request: pytest.FixtureRequest, work: Workspace, tmp_path: Path) -> Path:
    api.export("plant", tmp_path / "out", to=request.param, work=work)
    return tmp_path / "out"


def places(work: Workspace, folder: Path) -> list[str]:
    return [fault.where for fault in api.export_check(folder, work=work).faults]


def test_what_was_exported_is_whole(work: Workspace, folder: Path) -> None:
    before = sorted((work.store.root / "tmp").iterdir())
    found = api.export_check(folder, work=work)
    assert found.is_ok
    assert found.is_known
    assert str(found.ref) == "plant@bloom"
    assert sorted((work.store.root / "tmp").iterdir()) == before


def first(folder: Path) -> Path:
    return next(path for path in (folder / "model.safetensors", folder / "copy") if path.exists())


def changed(folder: Path) -> str:
    data = bytearray(first(folder).read_bytes())
    data[-1] ^= 1
    first(folder).write_bytes(data)
    return first(folder).name


def longer(folder: Path) -> str:
    first(folder).write_bytes(first(folder).read_bytes() + b"x")
    return first(folder).name


def missing(folder: Path) -> str:
    name = first(folder).name
    first(folder).unlink()
    return name


def foreign(folder: Path) -> str:
    (folder / "more").mkdir()
    (folder / "more" / "modeling.py").write_text("evil")
    return "more/modeling.py"


def linked(folder: Path) -> str:
    path = first(folder)
    path.rename(folder.parent / "aside")
    path.symlink_to(folder.parent / "aside")
    return path.name


@pytest.mark.parametrize("damage", [changed, longer, missing, foreign, linked])
def test_damage_is_named(work: Workspace, folder: Path, damage: Callable[[Path], str]) -> None:
    name = damage(folder)
    assert places(work, folder) == [name]


def record_of(folder: Path) -> ExportRecord:
    return ExportRecord.decode((folder / RECORD_FILE).read_bytes(), where="record")


def test_a_record_that_was_changed_with_its_files_is_found_by_a_fresh_export(work: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    api.export("plant", folder, to="list", work=work)
    changed(folder)
    record = record_of(folder)
    row = record.files["copy"]._replace(digest=Digest.of((folder / "copy").read_bytes()))
    record = ExportRecord(record.to, record.ref, record.artifact, {**record.files, "copy": row})
    (folder / RECORD_FILE).write_bytes(record.encode())
    (fault,) = api.export_check(folder, work=work).faults
    assert fault.where == "copy"
    assert "as it is exported now" in fault.expected
    lying = ExportRecord(record.to, StageRef("plant", "seedling"), record.artifact, record_of(folder).files)
    (folder / RECORD_FILE).write_bytes(lying.encode())
    assert places(work, folder) == ["copy", RECORD_FILE]


def test_without_the_artifact_the_record_speaks_alone(work: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    api.export("plant", folder, to="list", work=work)
    record = record_of(folder)
    other = ExportRecord(record.to, record.ref, Digest.of(b"elsewhere"), record.files)
    (folder / RECORD_FILE).write_bytes(other.encode())
    found = api.export_check(folder, work=work)
    assert found.is_ok
    assert not found.is_known


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "to": "x", "ref": "a", "artifact": "b", "files": []}']
)
def test_a_record_of_another_form_is_refused(work: Workspace, tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD_FILE).write_text(text)
    with pytest.raises(BadManifest):
        api.export_check(tmp_path, work=work)


@pytest.mark.parametrize("path", ["../x", "/x", "a\\b", "a//b"])
def test_a_record_leads_out_of_no_folder(work: Workspace, tmp_path: Path, path: str) -> None:
    api.export("plant", tmp_path / "out", to="list", work=work)
    document = json.loads((tmp_path / "out" / RECORD_FILE).read_text())
    document["files"][0]["path"] = path
    (tmp_path / "out" / RECORD_FILE).write_text(json.dumps(document))
    with pytest.raises(BadManifest, match="path is not acceptable"):
        api.export_check(tmp_path / "out", work=work)


def test_what_is_no_export_is_refused(work: Workspace, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UsageError, match="no folder that vpstore export has written"):
            api.export_check(place, work=work)


def test_the_command_says_what_is_wrong(built: Project, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    built.run("export", "plant", str(folder))
    assert built.run("export", "--check", str(folder)).stdout == f"no faults in {folder}, plant@bloom for dir\n"
    shutil.copy(folder / "model.safetensors", folder / "extra.safetensors")
    said = built.run("export", "--check", str(folder), code=3).stdout
    assert said.startswith("extra.safetensors\n  expected  nothing of this name\n")
    (folder / "\x1b[2Jgone").write_text("")  # a name that would clear the terminal
    assert "\x1b" not in built.run("export", "--check", str(folder), code=3).stdout
    assert "takes one directory" in built.run("export", "--check", str(folder), "plant", code=2).stderr
    assert "wants a ref and a directory" in built.run("export", "plant", code=2).stderr
