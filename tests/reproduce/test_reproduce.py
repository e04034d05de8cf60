"""vpstore reproduce: from the recorded recipe and inputs, tensor by tensor, and nothing but an attestation is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from garden_project import edit, forge, git_commit, manifest_of, open_store, with_shard
from small_project import Project

from vpstore.schema.ref import StageRef

BLOOM = StageRef("plant", "bloom")


def reproduce(project: Project, *arguments: str, code: int = 0, **more: str) -> Any:
    document = project.json("reproduce", *arguments, code=code, **more)
    assert document["ok"] == (code == 0)
    return document["reproductions"]


def differing(found: Any) -> dict[str, Any]:
    return {row["name"]: row for row in found["tensors"] if row["verdict"] != "identical"}


def new_files(before: dict[str, bytes], project: Project) -> list[str]:
    """What the store has got since; everything else must be as it was."""
    after = project.listing()
    assert {name: data for name, data in after.items() if name in before} == before
    work = project.store / "work"
    assert not work.is_dir() or list(work.iterdir()) == []
    assert list((project.store / "tmp").iterdir()) == []
    return sorted(after.keys() - before.keys())


def test_an_honest_artifact_is_identical_and_only_an_attestation_is_left(garden: Project) -> None:
    before = garden.listing()
    [found] = reproduce(garden, "plant")
    assert (found["verdict"], found["rebuilt"], found["method"]) == ("identical", found["artifact"], "whole")
    assert len(found["tensors"]) == found["tensors_total"] == 8
    assert found["proved_bytes"] == found["total_bytes"] == 1032
    assert {row["path"] for row in found["files"]} == {
        "config.json", "intermediate statistics", "provenance.json", "reports/metrics.json"
    }  # fmt: skip
    digits = found["attestation"].removeprefix("blake3:")
    assert new_files(before, garden) == [f".vpstore/attestations/{found['artifact'][7:]}/{digits}.json"]
    assert garden.run("verify", "--all").stdout == "no faults in the store .vpstore\n"


def test_the_attestation_is_shown_and_is_no_build(garden: Project) -> None:
    [found] = reproduce(garden, "plant")
    shown = garden.json("show", "plant")
    assert len(shown["attestations"]) == 1  # the build's
    [statement] = shown["reproductions"]
    predicate = statement["predicate"]
    assert statement["predicateType"] == "https://in-toto.io/attestation/test-result/v0.1"
    assert (predicate["result"], predicate["passedTests"]) == ("PASSED", ["artifact"])
    details = predicate["reproduction"]
    assert details["environment"] == {"device": "cpu"}
    assert details["machine"]["cpu"]
    text = json.dumps(statement)
    assert str(garden.root) not in text
    assert os.uname().nodename not in text
    assert "PASSED, whole, 100.0% of the tensor bytes identical" in garden.run("show", "plant").stdout

    folder = garden.store / "attestations" / found["artifact"][7:]
    for path in folder.iterdir():
        if path.name != found["attestation"][7:] + ".json":
            path.unlink()
    # Only the reproduction is left: it does not make a cache hit.
    assert "would be built" in garden.run("build", "plant", "--dry-run").stdout


def test_a_recipe_that_gives_other_bytes_each_time_is_found_with_magnitudes(garden: Project) -> None:
    garden.run("build", "--force", "plant", GARDEN_NOISE="c.weight")
    before = garden.listing()
    [found] = reproduce(garden, "plant", code=3, GARDEN_NOISE="c.weight")
    assert found["verdict"] == "different"
    assert found["rebuilt"] != found["artifact"]
    [(name, row)] = differing(found).items()
    assert (name, row["shard"]) == ("c.weight", "model-c.safetensors")
    assert 100 < row["max_abs"] < 256
    assert 0 < row["max_rel"] <= 2
    assert found["proved_bytes"] == 1032 - 200
    assert len(new_files(before, garden)) == 1
    predicate = garden.json("show", "plant")["reproductions"][0]["predicate"]
    assert (predicate["result"], predicate["failedTests"]) == ("FAILED", ["tensor c.weight"])
    text = garden.run("reproduce", "plant", code=3, GARDEN_NOISE="c.weight").stdout
    assert "DIFFERENT" in text
    assert "c.weight, model-c.safetensors: max abs" in text


@pytest.mark.parametrize(("epsilon", "code"), [((), 3), (("--epsilon", "2.5"), 3), (("--epsilon", "3"), 0)])
def test_an_epsilon_forgives_small_differences_and_no_others(
    garden: Project, epsilon: tuple[str, ...], code: int
) -> None:
    [found] = reproduce(garden, "plant", *epsilon, code=code, GARDEN_NUDGE="b.weight:3")
    row = differing(found)["b.weight"]
    assert row["max_abs"] == 3
    assert row["verdict"] == ("within" if code == 0 else "different")
    report = next(file for file in found["files"] if file["path"] == "reports/metrics.json")
    assert report["verdict"] == ("within" if epsilon else "different")  # its score moved by 0.03
    result = garden.json("show", "plant")["reproductions"][0]["predicate"]["result"]
    assert result == ("WARNED" if code == 0 else "FAILED")


@pytest.mark.parametrize(
    "change",
    [
        lambda project: edit(project, "small/grow.py", "STRENGTH = 1", "STRENGTH = 2"),
        lambda project: edit(project, "small/soil.py", "def tensors_of", "raise SystemExit\ndef tensors_of"),
        lambda project: (project.root / "small/grow.py").unlink(),
        lambda project: edit(project, "configs/plant.toml", "step = 2", "step = 77"),
        lambda project: edit(project, "configs/objects.toml", 'recipe = "small.grow"', 'recipe = "small.judge"'),
    ],
    ids=["another result", "broken", "deleted", "another config", "another recipe"],
)
def test_the_checked_out_recipes_are_not_used(garden: Project, change: Callable[[Project], Any]) -> None:
    change(garden)
    [found] = reproduce(garden, "plant")
    assert found["verdict"] == "identical"


@pytest.mark.parametrize("with_table", [True, False])
@pytest.mark.parametrize("wish", [(), ("--tensor", "c.weight"), ("--sample", "99")])
def test_a_forged_tensor_is_named(garden: Project, tmp_path: Path, with_table: bool, wish: tuple[str, ...]) -> None:
    def change(store: Any, manifest: Any) -> Any:
        return with_shard(store, manifest, "model-c.safetensors", -20, with_table=with_table, scratch=tmp_path)

    forged = forge(garden, BLOOM, change)
    assert garden.run("resolve", "plant").returncode == 0  # all digests agree
    [found] = reproduce(garden, "plant", *wish, code=3)
    assert found["artifact"] == forged.digest
    assert list(differing(found)) == ["c.weight"]
    assert differing(found)["c.weight"]["max_abs"] == 1


def test_a_forged_tensor_beside_the_chosen_ones_is_not_spoken_for(garden: Project, tmp_path: Path) -> None:
    forge(garden, BLOOM, lambda store, m: with_shard(store, m, "model-c.safetensors", -20, scratch=tmp_path))
    [found] = reproduce(garden, "plant", "--tensor", "a.weight")
    assert [row["name"] for row in found["tensors"]] == ["a.weight"]
    assert found["proved_bytes"] == 400


def test_a_missing_parent_is_said_with_its_role(garden: Project) -> None:
    parent = garden.json("show", "plant")["inputs"][0]["artifact"]
    shard = next(row for row in garden.json("show", "plant@sprout")["manifest"]["files"] if "model-a" in row["path"])
    data = garden.blob(parent).read_bytes()
    garden.blob(parent).unlink()
    before = garden.listing()
    error = garden.run("reproduce", "plant", code=12).stderr
    assert "plant@bloom, input parent" in error
    assert parent in error
    assert "vpstore resolve plant@sprout --rebuild" in error
    assert "input parent of plant@bloom" in garden.run("reproduce", "plant", "--chain", code=12).stderr
    assert new_files(before, garden) == []

    garden.blob(parent).write_bytes(data)
    garden.blob(shard["digest"]).unlink()
    assert "model-a.safetensors" in garden.run("reproduce", "plant", code=12).stderr


def test_a_chain_is_built_parents_first_and_goes_on_after_a_refusal(garden: Project) -> None:
    rows = reproduce(garden, "reports@plant-bloom", "--chain")
    assert [row["ref"] for row in rows] == ["seed@main", "plant@sprout", "plant@bloom", "reports@plant-bloom"]
    assert {row["verdict"] for row in rows} == {"identical"}
    rows = reproduce(garden, "plant", "--chain", code=3, GARDEN_FAULT="gate:1")
    assert [row["verdict"] for row in rows] == ["identical", None, "identical"]
    assert (rows[1]["error"]["kind"], rows[1]["error"]["found"]) == ("GateMissed", "1")
    assert "NOT REPRODUCED" in garden.run("reproduce", "plant", "--chain", code=3, GARDEN_FAULT="gate:1").stdout
    assert len(garden.json("show", "plant@sprout")["reproductions"]) == 1  # none of the attempts that were refused


def test_a_donor_comes_from_its_own_blobs_if_the_outside_file_is_gone_or_other(garden: Project) -> None:
    outside = garden.root / "assets" / "donor" / "model.safetensors"
    data = outside.read_bytes()
    outside.unlink()
    assert reproduce(garden, "seed")[0]["verdict"] == "identical"
    assert "source donor/model.safetensors: the store" in garden.run("reproduce", "seed", "--dry-run").stdout
    outside.write_bytes(data[:-1] + b"?")
    assert reproduce(garden, "seed")[0]["verdict"] == "identical"


def test_a_donor_whose_bytes_are_nowhere_is_refused(garden: Project) -> None:
    """The recorded SHA-256 decides: neither the changed file outside nor the changed blob will do."""
    edit(garden, "assets/donor/config.json", "64", "65")
    [row] = [row for row in manifest_of(garden, "seed")["files"] if row["path"] == "config.json"]
    other = (garden.root / "assets/donor/config.json").read_bytes()

    def change(store: Any, manifest: Any) -> Any:
        from dataclasses import replace

        new = [replace(f, digest=store.blobs.put_bytes(other)) if f.path == row["path"] else f for f in manifest.files]
        return replace(manifest, files=tuple(new))

    forge(garden, StageRef("seed", "main"), change)
    error = garden.run("reproduce", "seed", code=20).stderr
    assert "seed@main, source donor/config.json" in error


def test_what_was_rebuilt_can_be_kept(garden: Project, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    reproduce(garden, "plant", "--keep", str(folder))
    assert (folder / "work" / "model-a.safetensors").is_file()
    assert (folder / "tree" / "small" / "grow.py").is_file()
    assert "not empty" in garden.run("reproduce", "plant", "--keep", str(folder), code=2).stderr


def test_a_dry_run_says_where_everything_comes_from_and_writes_nothing(garden: Project, tmp_path: Path) -> None:
    before, log = garden.listing(), tmp_path / "log"
    text = garden.run("reproduce", "plant", "--dry-run", "--chain", GARDEN_LOG=str(log)).stdout
    assert "input parent: plant@sprout" in text
    assert "module small.run: the checkout" in text
    assert "source donor/model.safetensors: assets/donor/model.safetensors" in text
    assert not log.exists()
    assert new_files(before, garden) == []


def test_an_old_recipe_that_does_not_run_names_the_commit_to_check_out(garden: Project) -> None:
    commit = git_commit(garden)
    garden.run("build", "--force", "plant")
    done = garden.run("reproduce", "plant", code=1, GARDEN_FAULT="crash")
    assert "AttributeError: the frame lacks a function" in done.stderr
    assert f"git checkout {commit}" in done.stderr


@pytest.mark.parametrize(("fault", "code", "text"), [("killed", 1, "signal 9"), ("gate", 20, "growth is too slow")])
def test_an_attempt_that_fails_leaves_nothing(garden: Project, fault: str, code: int, text: str) -> None:
    before = garden.listing()
    done = garden.run("reproduce", "plant", code=code, GARDEN_FAULT=fault)
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert new_files(before, garden) == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_attempt_leaves_no_process_and_nothing_that_counts(
    garden: Project, tmp_path: Path, how: signal.Signals
) -> None:
    before, log = garden.listing(), tmp_path / "log"
    variables = garden.variables(GARDEN_FAULT="slow", GARDEN_LOG=str(log))
    process = subprocess.Popen(
        garden.command("reproduce", "plant"), cwd=garden.root, env=variables, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: log.exists() and log.read_text().endswith("\n"))
    child = int(log.read_text().split()[0])
    assert is_running(child)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    wait_until(lambda: not is_running(child))
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "interrupted; nothing was recorded" in err
        assert "Traceback" not in err
        assert new_files(before, garden) == []
    else:
        assert garden.listing() == before  # the folder of the killed attempt is not part of what the store holds
    [found] = reproduce(garden, "plant")
    assert found["verdict"] == "identical"
    assert len(new_files(before, garden)) == 1


def test_two_at_once_wait_for_each_other(garden: Project) -> None:
    pair = [
        subprocess.Popen(garden.command("reproduce", "plant"), cwd=garden.root, env=garden.variables())
        for _ in range(2)
    ]
    assert [process.wait(timeout=60) for process in pair] == [0, 0]
    assert len(open_store(garden).attestations.reproductions(artifact_of(garden))) >= 1


def artifact_of(project: Project) -> Any:
    from vpstore.schema.digest import Digest

    return Digest(project.json("show", "plant")["artifact"])


def test_the_code_of_the_checkout_cannot_slip_in(garden: Project) -> None:
    """A recorded file that is not in the tree's place is an error, whoever put another one on the path."""
    shutil.copytree(garden.root / "small", garden.cache / "elsewhere" / "small")
    slip = "    import small\n    small.__path__.insert(0, os.environ['ELSEWHERE'])\n    return importlib"
    edit(garden, "small/run.py", "    return importlib", slip)
    done = garden.run("reproduce", "plant", code=1, ELSEWHERE=str(garden.cache / "elsewhere" / "small"))
    assert "a recipe file was not loaded from the recorded ones" in done.stderr


def test_usage(garden: Project) -> None:
    for arguments, text in {
        ("plant", "--sample", "0"): "at least one",
        ("plant", "--seed", "1"): "a seed is for --sample",
        ("plant", "--sample", "1", "--tensor", "a.bias"): "two ways",
        ("plant", "--sample", "1", "--chain"): "a chain is reproduced whole",
        ("plant", "--with-intermediates"): "--with-intermediates",
        ("plant", "--epsilon", "nan"): "finite",
        ("reports@plant-bloom", "--sample", "1"): "no tensors",
        ("seed", "--sample", "1"): "one piece",
    }.items():
        assert text in garden.run("reproduce", *arguments, code=2).stderr
    assert "no.such" in garden.run("reproduce", "plant", "--tensor", "no.such", code=11).stderr
    edit(garden, "small/run.py", "def recompute(", "def something_else(")
    assert "cannot compute single tensors" in garden.run("reproduce", "plant", "--sample", "1", code=2).stderr


def wait_until(is_so: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
