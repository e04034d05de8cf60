"""What the commands say to somebody who begins: previews, hints, help, and lists that go on into other programs."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from small_project import Project

import vpstore.cli  # noqa: F401 - declares the commands
from vpstore import api
from vpstore.cli.group import cli
from vpstore.cli.overview import GROUPS
from vpstore.errors import NoSuchRef


def here(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.root)
    monkeypatch.setenv("XDG_CACHE_HOME", str(project.cache))


def test_a_preview_before_the_first_build_makes_no_store(project: Project) -> None:
    done = project.run("build", "--all", "--dry-run")
    assert re.match(r"seed@main  key [0-9a-f]{12}  would be built\n", done.stdout)
    assert "plant@sprout  would be built after seed@main, which its key covers\n" in done.stdout
    rows = project.json("build", "seed", "plant", "--dry-run")["builds"]
    assert [(row["ref"], row["key"] is None, row["waits_for"]) for row in rows] == [
        ("seed@main", False, []),
        ("plant@bloom", True, ["plant@sprout"]),
    ]
    assert not project.store.exists()
    planned = rows[0]["key"]
    assert project.json("build", "seed")["builds"][0]["key"] == planned


def test_a_preview_where_no_store_can_be_is_refused_as_the_build_is(project: Project, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "format").write_text("another\n")
    project.run("build", "seed", "--dry-run", code=10, VPSTORE_ROOT=str(tmp_path / "other"))
    assert " 10 no store" in " ".join(project.run("build", "--help").stdout.split())


def test_an_import_can_pin_what_lies_in_a_folder(project: Project, tmp_path: Path) -> None:
    """Without a pin other bytes are refused; with one, they are what the provenance says from then on."""
    provenance = next(path for path in project.root.rglob("*.json") if "sha256" in path.read_text())
    before = json.loads(provenance.read_text())
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(project.root / before["root"], elsewhere)
    (elsewhere / "config.json").write_text("{}")
    (elsewhere / "stray").write_text("x")
    project.run("import", "seed", str(elsewhere), code=20)
    assert json.loads(provenance.read_text()) == before
    assert "leave one" in project.run("import", "seed", str(elsewhere), "--pin", "--dry-run", code=2).stderr
    project.run("import", "seed", str(elsewhere), "--pin")
    after = json.loads(provenance.read_text())
    pinned = {row["path"]: row["sha256"] for row in after["files"]}
    assert pinned["config.json"] == hashlib.sha256(b"{}").hexdigest()
    assert [row["path"] for row in after["files"]] == [row["path"] for row in before["files"]]
    assert after["root"] == str(elsewhere)
    provenance.unlink()
    project.run("import", "seed", str(elsewhere), "--pin")
    anew = json.loads(provenance.read_text())
    assert [row["path"] for row in anew["files"]] == sorted([*(row["path"] for row in before["files"]), "stray"])
    assert anew["license"].startswith("unknown")
    assert "nothing to pin" in project.run("import", "plant@sprout", str(elsewhere), "--pin", code=2).stderr
    assert "nothing to pin" in project.run("import", "seed", str(tmp_path / "none"), "--pin", code=2).stderr


def test_a_format_that_nobody_offers_is_refused_with_the_list(project: Project, tmp_path: Path) -> None:
    project.run("build", "seed")
    said = project.run("export", "seed", str(tmp_path / "out"), "--to", "megatron", code=2).stderr
    assert "dir (the artifact's own files)" in said
    run = project.root / "small" / "run.py"
    run.write_text(
        run.read_text()
        + """

def exporters():
    return {"list": "names of the files"}


def export(target, source, folder, progress):
    (folder / "sub").mkdir()
    (folder / "sub" / "names").write_text("\\n".join(sorted(path.name for path in source.path.iterdir())))
    if (source.path.parent / "fails").exists():
        raise RuntimeError("half done")
"""
    )
    assert "list (names of the files)" in project.run("export", "seed", "out", "--to", "megatron", code=2).stderr
    done = project.json("export", "seed", str(tmp_path / "out"), "--to", "list")
    assert (done["to"], done["files"]) == ("list", 2)  # and the record
    assert "artifact.json" in (tmp_path / "out" / "sub" / "names").read_text()
    assert "not empty" in project.run("export", "seed", str(tmp_path / "out"), "--to", "list", code=2).stderr
    view = Path(project.run("resolve", "seed").stdout.strip())
    (view.parent / "fails").touch()
    assert "half done" in project.run("export", "seed", str(tmp_path / "half"), "--to", "list", code=1).stderr
    assert not [path.name for path in tmp_path.iterdir() if "half" in path.name or "export" in path.name]


def test_an_import_can_be_tried_first(project: Project) -> None:
    elsewhere = project.root.parent / "downloads"
    shutil.copytree(project.root / "assets" / "donor", elsewhere)
    assert "would be built" in project.run("import", "seed", str(elsewhere), "--dry-run").stdout
    assert not project.store.exists()
    (elsewhere / "config.json").write_text("{}")
    assert "wrong size" in project.run("import", "seed", str(elsewhere), "--dry-run", code=20).stderr
    said = project.run("import", "plant@sprout", str(elsewhere), code=2).stderr
    assert "  where     plant@sprout\n" in said


def test_an_empty_list_says_what_to_do(built: Project) -> None:
    done = built.run("ls", "--profile", "large")
    assert done.stdout.startswith("object@stage")
    assert "vpstore pull" in done.stderr
    assert "vpstore build --all" in done.stderr
    assert built.json("ls", "--profile", "large")["objects"] == []


def test_what_the_lock_names_and_is_not_here_is_to_be_pulled_or_built(built: Project) -> None:
    built.run("lock")
    assert "5 of profile tiny, none missing here" in built.run("doctor").stdout
    shutil.rmtree(built.store)
    shutil.rmtree(built.root / "weights")
    assert "vpstore pull" in built.run("resolve", "plant", code=10).stderr
    built.run("build", "seed")
    for line in ("resolve plant", "show plant", "diff plant seed", "reproduce plant", "export plant ../out"):
        said = built.run(*line.split(), code=12).stderr
        for command in ("vpstore pull plant@bloom", "vpstore resolve plant@bloom --fetch", "vpstore build plant@bloom"):
            assert command in said, line
    failed = [check for check in built.json("doctor", code=1)["checks"] if not check["ok"]]
    assert [check["name"] for check in failed] == ["lock entries"]
    assert failed[0]["detail"].startswith("4 of 5 are neither built nor pulled here: plant@sprout, plant@bloom")
    assert failed[0]["detail"].endswith(" and 1 more")
    assert "vpstore pull" in failed[0]["next_step"]


def test_what_the_lock_does_not_name_cannot_be_pulled(project: Project) -> None:
    project.run("build", "seed")
    for command in ("resolve", "graph"):
        said = project.run(command, "plant", code=11).stderr
        assert "vpstore build plant@bloom" in said
        assert "pull" not in said


def test_verify_says_what_was_verified(built: Project, tmp_path: Path) -> None:
    assert built.run("verify", "plant").stdout == "no faults in the store .vpstore\n"
    document = built.json("verify", "plant")
    assert document == {"schema": 1, "ok": True, "place": "the store .vpstore", "faults": []}
    file = next(row for row in built.json("show", "plant")["manifest"]["files"] if row["path"] == "model.safetensors")
    built.blob(file["digest"]).unlink()
    assert built.run("verify", "plant@bloom", code=3).stdout.endswith("in the store .vpstore\n")


def test_the_tensors_of_an_artifact_are_listed(built: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = built.json("show", "plant", "--tensors")["tensors"]
    assert [(row["name"], row["dtype"], row["shape"], row["file"]) for row in rows] == [
        ("body", "U8", [64], "model.safetensors"),
        ("kept", "U8", [32], "model.safetensors"),
        ("void", "U8", [0], "model.safetensors"),
    ]
    lines = built.run("show", "plant", "--tensors").stdout.splitlines()
    assert lines[0].split() == ["tensor", "dtype", "shape", "digest"]
    assert lines[1].split() == ["body", "U8", "64", rows[0]["digest"].removeprefix("blake3:")[:12]]
    assert "tensors" not in built.json("show", "plant")
    here(built, monkeypatch)
    with pytest.raises(NoSuchRef) as caught:
        api.open("plant")["Body"]
    assert caught.value.next_step == "did you mean body? vpstore show plant@bloom --tensors"


def test_the_command_alone_is_help(project: Project) -> None:
    done = project.run(code=2)
    assert "error" not in done.stderr
    assert done.stdout == ""
    assert done.stderr == project.run("--help").stdout


def test_help_shows_every_command_in_its_group_with_a_whole_line(project: Project) -> None:
    text = project.run("--help", COLUMNS="80").stdout
    assert "..." not in text.replace("[ARGS]...", "")
    for title, group in GROUPS.items():
        assert f"\n{title.capitalize()}:\n" in text
        for name, line in group.items():
            assert re.search(rf"^  {name} +{re.escape(line)}$", text, re.MULTILINE), name
    assert [name for group in GROUPS.values() for name in group] == cli.list_commands(click.Context(cli))


def test_a_list_that_is_cut_off_ends_quietly(built: Project) -> None:
    process = subprocess.Popen(
        built.command("ls"), cwd=built.root, env=built.variables(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()  # before anything is written, as `head` does after its lines
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert said == b""


def test_dvc_yaml_can_be_compared_before_it_is_written(project: Project) -> None:
    run = project.root / "small" / "run.py"
    run.write_text(run.read_text() + "\n\ndef param_keys(checkout, object, stage):\n    return {}\n")
    assert "would write" in project.run("pipeline", "--dry-run").stdout
    assert not (project.root / "dvc.yaml").exists()
    assert project.json("pipeline", "--write")["changed"]
    assert "says this already" in project.run("pipeline", "--write", "--dry-run").stdout
    assert not project.json("pipeline", "--dry-run")["changed"]


def test_every_command_has_a_function_of_its_name() -> None:
    others = {"import": "import_donor", "completion": None}  # as README says
    for name in cli.commands:
        function = others.get(name, name)
        assert function is None or callable(getattr(api, function)), name
    assert api.Terms(is_dry_run=True).is_dry_run  # what gc, audit and reproduce take
    assert api.Wish(sample=1).is_part
    assert api.Strictness(signed=True).signed


def test_build_all_builds_without_being_iterated(project: Project) -> None:
    code = "from vpstore import api; api.build_all(); print(api.resolve('plant').to_json()['path'])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=project.root, env=project.variables(), capture_output=True, text=True, check=True, timeout=60
    )
    assert Path(done.stdout.strip(), "model.safetensors").is_file()
    assert all(row["cached"] for row in project.json("build", "--all")["builds"])
