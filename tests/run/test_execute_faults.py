"""What recipes/execute.py refuses, with which words, and what it leaves for the next build."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import trial_recipe
from execute_children import computed, shards

from recipes import execute, runtime
from recipes.job import Job
from recipes.recipe import Gate, Report
from vpstore.errors import GateMissed, RecipeRefused, UsageError, VpstoreError
from vpstore.storage.atomic import disk_errors

BAD = trial_recipe.tensor_name(trial_recipe.BAD)
SHARD = "model-layer-002.safetensors"
PLAN = "trial_recipe"
TRAINING = "trial_training"


@pytest.fixture(autouse=True)
def _numerics(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, fixed as in a build; afterwards this process is as it was."""
    monkeypatch.setattr(runtime, "_done_with", [])
    monkeypatch.delenv(execute.WORKERS_VARIABLE, raising=False)
    for name, value in runtime.environment(1).items():
        monkeypatch.setenv(name, value)
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def silent(label: str, done: int, total: int) -> None:
    """Nobody watches."""


def build(scratch: Path, entry: str = PLAN, **params: Any) -> execute.Made:
    return execute.carry_out(Job(entry, params, 1, {}, {}, scratch), silent)


def again(scratch: Path) -> list[str]:
    """What a build without a fault computes now."""
    before = len(computed(scratch))
    build(scratch)
    return [name for _, name in computed(scratch)[before:]]


class Refusal(NamedTuple):
    params: dict[str, Any]
    what: str
    where: str
    found: str = ""
    entry: str = PLAN


REFUSALS = {
    "nan": Refusal({"fault": "nan"}, "a computed tensor is not finite", BAD, "8 of 8 values are NaN or infinite"),
    "infinite": Refusal({"fault": "infinite"}, "not finite", BAD, "8 of 8"),
    "shape": Refusal({"fault": "shape"}, "another tensor than it planned", BAD, "F32 [7]"),
    "dtype": Refusal({"fault": "dtype"}, "another tensor than it planned", BAD, "BF16 [8]"),
    "tensor twice": Refusal({"fault": "tensor twice"}, "a name twice", BAD),
    "shard and file": Refusal({"file": SHARD}, "a name twice", SHARD),
    "index and file": Refusal({"file": "model.safetensors.index.json"}, "a name twice", "model.safetensors.index.json"),
    "report and file": Refusal({"file": "reports/curve.json"}, "a name twice", "reports/curve.json"),
    "plot twice": Refusal({"fault": "plot twice"}, "a name twice", "sizes"),
    "step twice": Refusal({"steps": ["base", "base"]}, "a name twice", "base"),
    "gate twice": Refusal({"gates": [["a", 1.0, "<=", 2.0], ["a", 1.0, "<=", 2.0]]}, "a name twice", "a"),
    "nan figure": Refusal({"fault": "nan figure"}, "JSON cannot say", "reports/metrics.json", "nan"),
    "trained nan": Refusal({"value": 1e39}, "not finite", "model.norm.weight", "4 of 4", TRAINING),
    "trained dtype": Refusal(
        {"value": 1.0, "dtype": "complex64"}, "no shard can hold", "model.norm.weight", "torch.complex64", TRAINING
    ),
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS.keys())
def test_a_faulty_recipe_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    with pytest.raises(RecipeRefused) as caught:
        build(tmp_path, refusal.entry, **refusal.params)
    error = caught.value
    assert refusal.what in error.what
    assert error.where == refusal.where
    assert refusal.found in error.found
    assert error.exit_code == 20
    assert error.next_step


@pytest.mark.parametrize("params", [{"fault": "tensor twice"}, {"file": SHARD}], ids=["tensor", "file"])
def test_names_are_held_against_each_other_before_a_tensor_is_computed(tmp_path: Path, params: Any) -> None:
    with pytest.raises(RecipeRefused):
        build(tmp_path, **params)
    assert [name for _, name in computed(tmp_path)] == ["base"]


def test_what_was_whole_before_a_fault_is_not_computed_again(tmp_path: Path) -> None:
    with pytest.raises(RecipeRefused):
        build(tmp_path, fault="nan")
    assert again(tmp_path) == [trial_recipe.tensor_name(number) for number in (2, 3, 4)]
    (tmp_path / "whole").mkdir()
    build(tmp_path / "whole")
    assert shards(tmp_path) == shards(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["flipped", "cut", "no marker", "torn marker"])
def test_a_damaged_tensor_is_computed_again_and_no_other(tmp_path: Path, damage: str) -> None:
    build(tmp_path)
    assert again(tmp_path) == []
    sound, shard = shards(tmp_path), tmp_path / "shards" / SHARD
    name_of_marker = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "shards.done").iterdir())}
    marker = sorted(name_of_marker, key=lambda path: name_of_marker[path])[trial_recipe.BAD - 1]
    if damage == "flipped":
        shard.write_bytes(sound[SHARD][:-1] + bytes([sound[SHARD][-1] ^ 1]))
    elif damage == "cut":
        shard.write_bytes(sound[SHARD][:-1])
    elif damage == "no marker":
        marker.unlink()
    else:
        marker.write_text(marker.read_text()[:20])
    assert again(tmp_path) == [BAD]
    assert shards(tmp_path) == sound


def test_a_torn_intermediate_is_computed_again(tmp_path: Path) -> None:
    build(tmp_path)
    whole = tmp_path / "intermediates" / "000-base.safetensors"
    good = whole.read_bytes()
    whole.rename(whole.with_suffix(".safetensors.partial"))
    whole.with_suffix(".safetensors.partial").write_bytes(good[:10])
    assert again(tmp_path) == ["base"]
    assert whole.read_bytes() == good


def test_missed_gates_are_listed_with_their_figures_and_the_scratch_is_kept(tmp_path: Path) -> None:
    gates = [
        ["loss", 2.5, "<=", 2.0],
        ["entropy", 0.9, ">=", 0.8],
        ["changed", 3.0, "==", 0.0],
        ["gpu", None, "<=", 1.0],
    ]
    with pytest.raises(GateMissed) as caught:
        build(tmp_path, gates=gates)
    error = caught.value
    assert error.what == "2 of 4 gates missed: nothing was published"
    assert (error.where, error.exit_code) == (PLAN, 20)
    assert error.expected == "loss <= 2; changed == 0"
    assert error.found == "loss = 2.5; changed = 3"
    assert "scratch" in error.next_step
    assert again(tmp_path) == []


def test_a_gate_of_nan_is_missed(tmp_path: Path) -> None:
    with pytest.raises(GateMissed) as caught:
        build(tmp_path, fault="nan gate")
    assert caught.value.found == "undefined = nan"


def test_a_training_that_misses_its_gate_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(GateMissed, match="1 of 1"):
        build(tmp_path, TRAINING, value=1.0, loss=2.5)


def test_a_training_is_written_as_it_came_out_now(tmp_path: Path) -> None:
    """Its report speaks of these tensors, not of those that an earlier attempt left in the scratch folder."""
    for name, value in (("old", 1.0), ("new", 2.0)):
        (tmp_path / name).mkdir()
        build(tmp_path / name, TRAINING, value=value)
    build(tmp_path / "old", TRAINING, value=2.0)
    assert shards(tmp_path / "old") == shards(tmp_path / "new")


def test_a_disk_with_too_little_room_is_refused_before_a_tensor_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = 1000 * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(need, 1, need - 1))
    with pytest.raises(VpstoreError, match="too full") as caught:
        build(tmp_path, count=1, elements=1000)
    assert caught.value.exit_code == 1
    assert (caught.value.where, caught.value.found) == (str(tmp_path), f"{need - 1:,} bytes free")
    assert "VPSTORE_ROOT" in caught.value.next_step
    assert [name for _, name in computed(tmp_path)] == ["base"]
    build(tmp_path, count=1, elements=900)  # with its header it fits


@pytest.mark.parametrize("place", [f"shards/{SHARD}", "files/notes.json", "files/reports/metrics.json"])
def test_a_disk_that_fills_up_is_explained_and_the_build_taken_up(tmp_path: Path, place: str) -> None:
    """/dev/full is the kernel's own full disk: each write to it fails with ENOSPC."""
    target = tmp_path / place

    def fill(names: list[str]) -> list[str]:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.symlink_to("/dev/full")
        return sorted(names)

    job = Job(PLAN, {}, 1, {}, {}, tmp_path)
    with pytest.raises(VpstoreError) as caught, disk_errors(tmp_path, "building it"):
        execute.carry_out(job, silent, order=fill)
    assert caught.value.what == f"building it failed: {os.strerror(errno.ENOSPC)}"
    assert "free space" in caught.value.next_step
    done = 1 if place.startswith("shards") else 4
    target.unlink()
    assert len(again(tmp_path)) == 4 - done
    (tmp_path / "whole").mkdir()
    build(tmp_path / "whole")
    assert shards(tmp_path) == shards(tmp_path / "whole")


@pytest.mark.parametrize("text", ["two", "-1", "0", "1.5", ""])
def test_a_number_of_workers_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv(execute.WORKERS_VARIABLE, text)
    with pytest.raises(UsageError) as caught:
        build(tmp_path)
    assert (caught.value.where, caught.value.exit_code) == (execute.WORKERS_VARIABLE, 2)
    assert caught.value.next_step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "kind", "where"), [("nan", RecipeRefused, BAD), ("killed", VpstoreError, PLAN)], ids=["nan", "killed"]
)
def test_a_fault_in_a_worker_reaches_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, kind: type[VpstoreError], where: str
) -> None:
    monkeypatch.setenv(execute.WORKERS_VARIABLE, "2")
    with pytest.raises(VpstoreError) as caught:
        build(tmp_path, fault=fault)
    assert (type(caught.value), caught.value.where) == (kind, where)
    assert caught.value.next_step
    monkeypatch.delenv(execute.WORKERS_VARIABLE)
    assert BAD in again(tmp_path)


def test_the_report_becomes_sorted_json_files(tmp_path: Path) -> None:
    build(tmp_path, gates=[["loss", 1.5, "<=", 2.0]])
    folder = tmp_path / "files" / "reports"
    assert sorted(path.name for path in folder.iterdir()) == ["curve.json", "metrics.json", "sizes.json"]
    metrics = json.loads((folder / "metrics.json").read_text())
    gate = {"value": 1.5, "relation": "<=", "threshold": 2.0, "verdict": "passed"}
    assert metrics == {"planned": 4, "largest": 11.0, "gates": {"loss": gate}}
    assert json.loads((folder / "curve.json").read_text()) == [{"x": 1, "y": 11.0}]
    assert [row["layer"] for row in json.loads((folder / "sizes.json").read_text())] == [1, 2, 3, 4]


def written(report: Report, folder: Path) -> dict[str, str]:
    folder.mkdir()
    for file in execute.report_files(report):
        with (folder / Path(file.name).name).open("wb") as out:
            file.write(out)
        assert file.media_type == "application/json"
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_report_without_figures_is_an_empty_table(tmp_path: Path) -> None:
    assert written(Report(), tmp_path / "empty") == {"metrics.json": "{}\n"}


def test_the_order_of_figures_decides_no_byte_of_a_report(tmp_path: Path) -> None:
    gates = [Gate("a", 1.0, "<=", 2.0), Gate("b", None, ">=", 0.5, "needs a GPU")]
    rows = [{"x": 2, "y": 0.1}, {"x": 1, "y": 0.2}]
    first = written(Report({"u": 1, "v": {"x": 1, "y": 2}}, gates, {"p": rows, "q": []}), tmp_path / "first")
    second = written(Report({"v": {"y": 2, "x": 1}, "u": 1}, gates[::-1], {"q": [], "p": rows}), tmp_path / "second")
    assert first == second
    assert first["p.json"] != written(Report(plots={"p": rows[::-1]}), tmp_path / "third")["p.json"]
    unmeasured = json.loads(first["metrics.json"])["gates"]["b"]
    assert unmeasured == {
        "value": None,
        "relation": ">=",
        "threshold": 0.5,
        "verdict": "not measurable",
        "reason": "needs a GPU",
    }
