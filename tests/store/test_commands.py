"""The commands, from a fresh checkout to a locked chain: each is run as a person runs it."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from small_project import Project

from vpstore.cli.exit_codes import exit_codes, table
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import Manifest


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def test_a_fresh_checkout_builds_in_order_and_then_does_nothing(project: Project) -> None:
    log = project.root.parent / "log"
    rows = project.json("build", "--all", SMALL_LOG=str(log))["builds"]
    assert [row["ref"] for row in rows] == [
        "seed@main",
        "plant@sprout",
        "plant@bloom",
        "reports@plant-sprout",
        "reports@plant-bloom",
    ]
    assert not any(row["cached"] for row in rows)
    assert [row["figure"] for row in rows] == [None, 2.08, 2.208, None, None]
    before = project.listing()
    again = project.json("build", "--all", SMALL_LOG=str(log))["builds"]
    assert all(row["cached"] for row in again)
    assert [row["artifact"] for row in again] == [row["artifact"] for row in rows]
    assert project.listing() == before
    assert len(log.read_text().splitlines()) == 2


def test_two_checkouts_give_the_same_digests(built: Project, project: Project) -> None:
    shutil.rmtree(built.store)
    shutil.rmtree(built.root / "weights")
    again = {row["artifact"] for row in built.json("build", "--all")["builds"]}
    elsewhere = built.root.parent / "a place with another name"
    built.root.rename(elsewhere)
    assert {row["artifact"] for row in Project(elsewhere, built.cache).json("ls")["objects"]} == again
    for hidden in ("attested", "hostname", str(elsewhere), str(built.root)):
        for path in (elsewhere / ".vpstore" / "blobs").rglob("*"):
            assert not path.is_file() or hidden.encode() not in path.read_bytes()


def test_resolve_prints_one_line_and_the_files_are_there(built: Project) -> None:
    done = built.run("resolve", "plant")
    path = Path(done.stdout.removesuffix("\n"))
    assert "\n" not in str(path)
    assert done.stderr == ""
    assert sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if not p.is_dir()) == [
        "artifact.json",
        "model.safetensors",
        "provenance.json",
        "reports/metrics.json",
    ]
    manifest = Manifest.decode((path / "artifact.json").read_bytes(), where="view")
    assert path.name == f"plant@bloom-{manifest.digest.short}"
    for row in manifest.files:
        assert Digest.of((path / row.path).read_bytes()) == row.digest
    assert json.loads((path / "provenance.json").read_text()) == manifest.build.to_json()
    lines = path.with_name(path.name + ".intoto.jsonl").read_text().splitlines()
    assert [json.loads(line)["subject"][0]["digest"]["blake3"] for line in lines] == [manifest.digest.hex]


def test_a_donor_is_kept_verbatim(built: Project) -> None:
    path = Path(built.run("resolve", "seed").stdout.strip())
    for name in ("config.json", "model.safetensors"):
        assert (path / name).read_bytes() == (built.root / "assets/donor" / name).read_bytes()
    assert not (path / "provenance.json").exists()


def test_modes_stages_and_prefixes_name_the_same_artifacts(built: Project) -> None:
    sprout = built.json("resolve", "plant@sprout")
    assert built.json("resolve", "plant.green") == sprout
    prefix = sprout["artifact"].removeprefix("blake3:")[:12]
    assert built.json("resolve", f"plant#{prefix}") == sprout
    built.run("resolve", f"seed#{prefix}", code=11)
    built.run("resolve", "plant#000000", code=11)


def test_unchanged_tensors_share_digests_and_files_share_blobs(built: Project) -> None:
    tables = []
    for ref in ("plant@sprout", "plant@bloom"):
        files = {row["path"]: row for row in built.json("show", ref)["manifest"]["files"]}
        table_of = json.loads(built.blob(files["model.safetensors"]["tensors"]).read_text())
        tables.append({row["name"]: row["digest"] for row in table_of["tensors"]})
    assert tables[0]["kept"] == tables[1]["kept"]
    assert tables[0]["body"] != tables[1]["body"]


def test_recipe_files_are_blobs(built: Project) -> None:
    shown = built.json("show", "plant")
    files = shown["manifest"]["build"]["recipe"]["files"]
    assert [row["path"] for row in files] == ["small/__init__.py", "small/grow.py", "small/soil.py"]
    for row in files:
        assert built.blob(row["digest"]).read_bytes() == (built.root / row["path"]).read_bytes()
    assert shown["inputs"][0]["ref"] == "plant@sprout"
    facts = shown["attestations"][0]["predicate"]
    assert facts["buildDefinition"]["internalParameters"]["environment"] == {"device": "cpu"}


def test_reports_lie_where_git_sees_them_and_follow_the_artifact(built: Project) -> None:
    folder = built.root / "reports" / "tiny" / "plant-bloom"
    assert json.loads((folder / "metrics.json").read_text()) == {"step": 2}
    before = (folder / "metrics.json").stat().st_mtime_ns
    (folder / "mine.json").write_text("{}")
    built.run("build", "plant")
    assert (folder / "metrics.json").stat().st_mtime_ns == before
    assert (folder / "mine.json").read_text() == "{}"
    (folder / "metrics.json").write_text("edited")
    built.run("build", "plant")
    assert json.loads((folder / "metrics.json").read_text()) == {"step": 2}


def test_one_character_in_a_recipe_rebuilds_what_depends_on_it_and_nothing_else(built: Project) -> None:
    recipe = built.root / "small" / "judge.py"
    recipe.write_text(recipe.read_text().replace("1000", "1001"))
    rows = {row["ref"]: row["cached"] for row in built.json("build", "--all")["builds"]}
    assert [ref for ref, cached in rows.items() if not cached] == ["reports@plant-sprout", "reports@plant-bloom"]
    recipe = built.root / "small" / "run.py"
    recipe.write_text(recipe.read_text() + "# moves bytes, makes none\n")
    assert all(row["cached"] for row in built.json("build", "--all")["builds"])


def test_a_comment_in_the_config_changes_nothing_a_value_does_and_going_back_is_a_hit(built: Project) -> None:
    config = built.root / "configs" / "plant.toml"
    text = config.read_text()
    config.write_text("# a comment\n" + text)
    assert built.json("build", "plant")["builds"][0]["cached"]
    first = built.pointer("plant-bloom").read_bytes()
    config.write_text(text.replace("step = 2", "step = 3"))
    assert not built.json("build", "plant")["builds"][0]["cached"]
    assert built.pointer("plant-bloom").read_bytes() != first
    config.write_text(text)
    assert built.json("build", "plant")["builds"][0]["cached"]
    assert built.pointer("plant-bloom").read_bytes() == first


def test_another_environment_is_no_cache_hit_and_equal_bytes_add_an_attestation(built: Project) -> None:
    row = built.json("build", "plant", SMALL_DEVICE="gpu")["builds"][0]
    assert not row["cached"]
    assert row["artifact"] == built.json("resolve", "plant")["artifact"]
    assert len(built.json("show", "plant")["attestations"]) == 2
    assert built.json("build", "plant", SMALL_DEVICE="gpu")["builds"][0]["cached"]
    assert built.json("build", "plant")["builds"][0]["cached"]


def test_a_build_that_does_not_reproduce_is_said_aloud(built: Project) -> None:
    first = built.json("build", "plant", "--force", SMALL_NOISE="1")["builds"][0]["artifact"]
    done = built.run("build", "plant", "--force", SMALL_NOISE="1")
    assert "has also given" in done.stderr
    assert Digest(first).short in done.stderr


def test_import_takes_a_donor_from_elsewhere(project: Project) -> None:
    usual = project.root / "assets" / "donor"
    elsewhere = project.root.parent / "downloads"
    shutil.move(usual, elsewhere)
    done = project.run("build", "seed", code=20)
    assert "a source file is missing" in done.stderr
    assert "vpstore import" in done.stderr
    row = project.json("import", "seed", str(elsewhere))["builds"][0]
    shutil.move(elsewhere, usual)
    assert project.json("build", "seed")["builds"][0] == {**row, "cached": True}
    project.run("import", "plant@sprout", str(usual), code=2)
    project.run("import", "seed", str(usual / "nothing"), code=2)
    (usual / "config.json").write_text('{"hidden": 65}\n')
    refused = project.run("import", "seed", str(usual), "--force", code=20)
    assert "other bytes" in refused.stderr


def test_since_counts_builds_of_this_run(project: Project) -> None:
    started = time.time()
    project.run("build", "seed")
    rows = project.json("build", "--all", "--since", str(int(started)))["builds"]
    assert [(row["cached"], row["new"]) for row in rows][:2] == [(True, True), (False, True)]
    later = project.json("build", "--all", "--since", str(int(started) + 1000))["builds"]
    assert not any(row["new"] for row in later)
    table_text = project.run("build", "--all", "--since", str(int(started))).stdout
    assert "cache hit" not in table_text
    assert "score" in table_text  # the key of [summary] heads the column
    assert "2.2080" in table_text


def test_a_dry_run_changes_nothing(project: Project) -> None:
    project.run("build", "seed")
    before = project.listing()
    rows = project.json("build", "seed", "plant@sprout", "--dry-run")["builds"]
    assert [row["cached"] for row in rows] == [True, False]
    assert project.listing() == before


def test_no_store_no_ref_and_no_sense_have_their_codes(project: Project, tmp_path: Path) -> None:
    project.run("ls", code=10)
    project.run("resolve", "plant", code=10)
    assert not project.store.exists()
    error = project.json("build", "nothing", code=11)["error"]
    assert (error["kind"], error["exit_code"]) == ("NoSuchRef", 11)
    assert error["next_step"]
    for arguments in (
        ["build"],
        ["build", "a b"],
        ["nonsense"],
        ["resolve"],
        ["build", "seed", "--all"],
        ["ls", "--what"],
    ):
        project.run(*arguments, code=2)
    assert project.json("nonsense", code=2)["error"]["kind"] == "UsageError"
    missing = project.run("build", "plant", code=11)
    assert "vpstore build plant@sprout" in missing.stderr
    assert "dvc repro" in missing.stderr


def test_the_store_may_lie_elsewhere(project: Project, tmp_path: Path) -> None:
    shared = tmp_path / "shared store"
    project.environment["VPSTORE_ROOT"] = str(shared)
    project.run("build", "seed")
    assert (shared / "format").read_text() == "vpstore 2\n"
    assert not project.store.exists()
    path = Path(project.run("resolve", "seed").stdout.strip())
    assert (path / "config.json").read_bytes() == (project.root / "assets/donor/config.json").read_bytes()


def test_commands_work_from_a_folder_below(built: Project) -> None:
    below = Project(built.root / "small", built.cache)
    assert below.run("resolve", "plant").stdout == built.run("resolve", "plant").stdout


def test_doctor_knows_what_is_missing(project: Project, built: Project) -> None:
    assert built.json("doctor")["ok"]
    shutil.rmtree(built.store / "blobs")
    (built.store / "blobs" / "blake3").mkdir(parents=True)
    failed = [check for check in built.json("doctor", code=1)["checks"] if not check["ok"]]
    assert [check["name"] for check in failed] == ["pointers"]
    assert failed[0]["next_step"]
    (built.root / "configs" / "objects.toml").write_text("format = 1\n")
    failed = [check["name"] for check in built.json("doctor", code=1)["checks"] if not check["ok"]]
    assert failed == ["objects"]


def test_help_has_an_example_and_exit_codes(project: Project) -> None:
    listed = project.run("--help").stdout
    for name in ("build", "resolve", "ls", "show", "lock", "verify", "import", "doctor", "completion"):
        assert name in listed
        text = project.run(name, "--help").stdout
        assert "Example: " in text
        assert "Exit codes: 0 done" in text


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_prints_a_script(project: Project, shell: str) -> None:
    assert "_VPSTORE_COMPLETE" in project.run("completion", shell).stdout


def test_every_exit_code_of_the_classes_is_in_the_table() -> None:
    assert set(exit_codes()) == {0, 1, 2, 3, 10, 11, 12, 13, 14, 15, 16, 20, 130, 141}
    assert "| 13 | digest mismatch | `DigestMismatch` |" in table()


def test_what_dvc_lacks_outside_its_environment_is_said(built: Project) -> None:
    (built.root / ".dvc").mkdir()
    checks = {row["name"]: row for row in built.json("doctor", code=1, PATH="/nonexistent")["checks"]}
    assert not checks["command"]["ok"]
    assert "dvc repro" in checks["command"]["next_step"]
    checks = {row["name"]: row for row in json.loads(built.outcome("doctor", "--json").stdout)["checks"]}
    assert checks["command"]["ok"] or "PATH=" in checks["command"]["next_step"]
    assert "no_scm" in checks["git"]["detail"]
    assert checks["file system of the store"]["ok"]
    assert checks["file system of the checkout"]["ok"]


def test_a_commit_that_git_does_not_tell_is_attested_as_unknown(built: Project) -> None:
    (built.root / ".git").mkdir()  # as one that git refuses: it is there, and nothing can be had from it
    said = built.run("build", "seed", "--force").stderr
    assert "attested as unknown" in said
    attested = built.json("show", "seed")["attestations"]
    assert "unknown" in json.dumps(attested)
