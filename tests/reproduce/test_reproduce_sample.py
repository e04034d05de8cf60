"""reproduce --sample and --tensor: which tensors are chosen, what is computed for them, and what share that proves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from garden_project import SIZES, computed, edit, forge, manifest_of, with_intermediate
from hypothesis import given
from hypothesis import strategies as st
from small_project import Project

from vpstore.rebuilding.sampling import choose
from vpstore.schema.digest import Digest
from vpstore.schema.ref import StageRef
from vpstore.schema.tensor_table import TensorRow, TensorTable

BLOOM = StageRef("plant", "bloom")
TOTAL = sum(SIZES.values()) + 8 * len(SIZES)


def sample(project: Project, *arguments: str, code: int = 0, **more: str) -> Any:
    return project.json("reproduce", "plant", *arguments, code=code, **more)["reproductions"][0]


def test_only_the_named_tensors_are_computed_and_the_share_is_theirs(garden: Project, tmp_path: Path) -> None:
    log = tmp_path / "log"
    found = sample(garden, "--tensor", "b.bias", "--tensor", "d.weight", GARDEN_LOG=str(log))
    assert computed(log) == ["b.bias", "d.weight"]  # and no statistics: they are given
    assert {row["name"]: row["size_bytes"] for row in found["tensors"]} == {"b.bias": 8, "d.weight": 100}
    assert (found["proved_bytes"], found["total_bytes"], found["tensors_total"]) == (108, TOTAL, 8)
    assert (found["method"], found["seed"], found["rebuilt"]) == ("sample", None, None)
    assert found["given_intermediates"] == ["statistics"]
    assert found["not_compared"] == ["reports/metrics.json"]
    assert {row["path"] for row in found["files"]} == {"config.json", "provenance.json"}
    text = garden.run("reproduce", "plant", "--tensor", "d.weight").stdout
    assert f"{100 / TOTAL:.1%}" in text
    assert "1 intermediates, taken from the artifact" in text


def test_a_sample_visits_every_shard_and_its_seed_repeats_it(garden: Project) -> None:
    first = sample(garden, "--sample", "4")
    assert {row["shard"] for row in first["tensors"]} == {f"model-{name}.safetensors" for name in SIZES}
    again = sample(garden, "--sample", "4", "--seed", str(first["seed"]))
    assert [row["name"] for row in again["tensors"]] == [row["name"] for row in first["tensors"]]
    statements = [row["predicate"]["reproduction"] for row in garden.json("show", "plant")["reproductions"]]
    assert {row["seed"] for row in statements} == {first["seed"]}
    assert {row["method"] for row in statements} == {"sample"}
    tests = garden.json("show", "plant")["reproductions"][0]["predicate"]["passedTests"]
    assert {f"tensor {row['name']}" for row in first["tensors"]} <= set(tests)


def test_a_sample_larger_than_the_artifact_is_all_of_it(garden: Project) -> None:
    found = sample(garden, "--sample", "100")
    assert (len(found["tensors"]), found["proved_bytes"]) == (8, TOTAL)


def test_a_sampled_tensor_that_differs_is_not_counted_as_proved(garden: Project) -> None:
    found = sample(garden, "--sample", "8", code=3, GARDEN_NUDGE="a.weight:1")
    assert [row["name"] for row in found["tensors"] if row["verdict"] == "different"] == ["a.weight"]
    assert found["proved_bytes"] == TOTAL - 400


def test_given_intermediates_are_believed_unless_they_are_computed_too(garden: Project, tmp_path: Path) -> None:
    """A forged intermediate whose tensors were made from it passes as given, and only then."""
    garden.run("build", "--force", "plant")

    def change(store: Any, manifest: Any) -> Any:
        return with_intermediate(store, manifest, tmp_path, lambda data: data[:-4] + bytes([data[-4] + 1] * 4))

    honest = sample(garden, "--sample", "8", "--with-intermediates", GARDEN_LOG=str(tmp_path / "log"))
    assert computed(tmp_path / "log")[0] == "statistics"
    assert honest["given_intermediates"] == []
    assert "intermediate statistics" in {row["path"] for row in honest["files"]}

    forge(garden, BLOOM, change)
    names = ("--sample", "8", "--seed", "1")
    assert sample(garden, *names, code=3)["verdict"] == "different"  # tensors do not follow from what is given
    found = sample(garden, *names, "--with-intermediates", code=3)
    assert {row["verdict"] for row in found["tensors"]} == {"identical"}
    assert [row["path"] for row in found["files"] if row["verdict"] == "different"] == ["intermediate statistics"]


@pytest.mark.parametrize(
    ("before", "after", "name", "note"),
    [
        ('(("weight", SIZES[s]), ("bias", 8))', '(("weight", SIZES[s]),)', "d.bias", "lacks it"),
        ('(("weight", SIZES[s]), ("bias", 8))', '(("weight", SIZES[s]), ("bias", 8), ("x", 1))', "d.x", "only the"),
        ('(("weight", SIZES[s]), ("bias", 8))', '(("weight", SIZES[s]), ("bias", 9))', "d.bias", "rebuilt as U8 [9]"),
    ],
)
def test_the_names_and_shapes_of_all_tensors_are_held_against_the_plan(
    garden: Project, tmp_path: Path, before: str, after: str, name: str, note: str
) -> None:
    """The recorded recipe is exchanged for one with another plan: a sample of one tensor notices."""

    def change(store: Any, manifest: Any) -> Any:
        from dataclasses import replace

        from vpstore.schema.digest import Digest
        from vpstore.schema.normal_form import normal_form

        [row] = [row for row in manifest.build.recipe_files if row.path == "small/grow.py"]
        text = store.blobs.read(row.digest).decode()
        assert before in text
        data = text.replace(before, after).encode()
        code = Digest.of(normal_form(data, where=row.path).data)
        other = row._replace(digest=store.blobs.put_bytes(data), code=code)
        files = tuple(other if file == row else file for file in manifest.build.recipe_files)
        return replace(manifest, build=replace(manifest.build, recipe_files=files))

    forge(garden, BLOOM, change)
    found = sample(garden, "--tensor", "a.weight", code=3)
    wrong = {row["name"]: row["note"] for row in found["tensors"] if row["verdict"] == "different"}
    assert note in wrong[name]
    assert {part.split(".")[1] for part in wrong} == {name.split(".")[1]}
    assert len(wrong) == len(SIZES)


def test_a_forged_file_beside_the_shards_shows_in_a_sample(garden: Project) -> None:
    def change(store: Any, manifest: Any) -> Any:
        from dataclasses import replace

        def other(row: Any) -> Any:
            data = b'{"shards": 5}\n'
            return replace(row, digest=store.blobs.put_bytes(data)) if row.path in names else row

        return replace(manifest, files=tuple(other(row) for row in manifest.files))

    names = ("config.json", "provenance.json")
    forge(garden, BLOOM, change)
    found = sample(garden, "--tensor", "a.bias", code=3)
    assert {row["path"] for row in found["files"] if row["verdict"] == "different"} == set(names)


def test_the_checked_out_recipe_is_not_used_for_a_sample(garden: Project) -> None:
    edit(garden, "small/grow.py", "STRENGTH = 1", "STRENGTH = 2")
    assert sample(garden, "--sample", "8")["verdict"] == "identical"
    assert "STRENGTH = 2" not in json.dumps(manifest_of(garden, "plant"))


def table(names: dict[str, int]) -> TensorTable:
    rows, at = [], 10
    for name, size in names.items():
        rows.append(TensorRow(name, "U8", (size,), at, at + size, Digest.of(b"")))
        at += size
    return TensorTable(at, (10, Digest.of(b"")), tuple(rows))


TABLES = {f"s{n}": table({f"{n}.{m}": 10 * (m + 1) for m in range(5)}) for n in range(6)}


@given(st.integers(0, 2**53 - 1), st.integers(1, 40))
def test_a_choice_is_without_repetition_and_even_over_shards(seed: int, count: int) -> None:
    names = choose(TABLES, count=count, seed=seed)
    assert len(names) == len(set(names)) == min(count, 30)
    per_shard = [sum(name.startswith(f"{n}.") for name in names) for n in range(6)]
    assert max(per_shard) - min(per_shard) <= 1
    assert names == choose(dict(reversed(TABLES.items())), count=count, seed=seed)
    assert choose(TABLES, count=max(1, count - 1), seed=seed) == names[: max(1, min(count - 1, 30))]


def test_large_tensors_and_shards_tend_to_come_first_and_every_one_can() -> None:
    tables = {"large": table({"l.big": 900, "l.small": 100}), "small": table({"s.one": 100})}
    firsts = [choose(tables, count=1, seed=seed)[0] for seed in range(400)]
    assert set(firsts) == {"l.big", "l.small", "s.one"}
    assert 190 < firsts.count("l.big") < 290  # 60 in 100: the roots are 30, 10 and 10
