"""What a recipe made, judged before it is stored: files alone, at least one, and shards that agree with their index."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from small_project import Project, write

from vpstore.errors import BadManifest, RecipeRefused
from vpstore.runner import Staged, StagedFile
from vpstore.schema.digest import Digest
from vpstore.schema.shard_index import Places, locate
from vpstore.schema.tensor_table import TensorRow, TensorTable
from vpstore.staging import refuse_unfit, remarks

KINDS: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a link": lambda path: path.symlink_to(path.parent / "model.bin"),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to a folder": lambda path: path.symlink_to("/"),
    "a socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
}


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    (tmp_path / "s" / "out").mkdir(parents=True)
    (tmp_path / "s" / "out" / "model.bin").write_bytes(b"x")
    return tmp_path / "s"


def listed(scratch: Path) -> Staged:
    """As the runner of the page lists them: what is a file, or a link to one."""
    out = scratch / "out"
    found = sorted(path for path in out.rglob("*") if path.is_file())
    return Staged([StagedFile(path.relative_to(out).as_posix(), "x/y", path) for path in found])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["a", "z", "sub/z"])
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the socket's file is what counts
def test_what_is_no_file_is_refused_by_name_whatever_the_order(scratch: Path, kind: str, name: str) -> None:
    path = scratch / "out" / name
    path.parent.mkdir(exist_ok=True)
    KINDS[kind](path)
    with pytest.raises(RecipeRefused) as caught:
        refuse_unfit(listed(scratch), scratch, where="seed@main")
    assert caught.value.where == f"seed@main, {name}"
    assert kind.split(" to ")[0] in caught.value.found


def test_files_alone_pass_and_a_source_from_outside_may_be_a_link(scratch: Path, tmp_path: Path) -> None:
    (tmp_path / "donor.bin").symlink_to(scratch / "out" / "model.bin")
    staged = listed(scratch)
    staged.files.append(StagedFile("donor.bin", "x/y", tmp_path / "donor.bin"))
    refuse_unfit(staged, scratch, where="seed@main")


@pytest.mark.parametrize(
    "staged", [Staged([]), Staged([StagedFile("a", "x/y", Path("/nowhere"))])], ids=["none", "gone"]
)
def test_nothing_is_no_result(scratch: Path, staged: Staged) -> None:
    with pytest.raises(RecipeRefused):
        refuse_unfit(staged, scratch, where="seed@main")


def test_what_gets_lost_or_belongs_to_this_machine_is_said(scratch: Path) -> None:
    out, home = scratch / "out", Path("/home/somebody")
    assert remarks(listed(scratch), scratch, places=[home]) == []
    (out / "model.bin").chmod(0o755)
    (out / "empty").mkdir()
    (out / "a.json").write_text('{"from": "/home/somebody/x", "not": "/home/somebody2"}')
    (out / "b.json").write_text('{"not": "/home/somebody2"}')
    assert remarks(listed(scratch), scratch, places=[home, Path("/b")]) == [
        "not kept: that a file may be executed: model.bin",
        "not kept: a folder without files: empty",
        "a path of this machine is in the result: a.json, byte 10",
    ]


def places(shards: dict[str, list[str]], **indexes: dict[str, str]) -> Places:
    """Tables of shards that hold tensors of one byte, each shard with bytes of its own."""
    tables = {}
    for path, names in shards.items():
        rows = [
            TensorRow(name, "U8", (1,), at, at + 1, Digest.of(f"{path} {name}".encode()))
            for at, name in enumerate(names)
        ]
        tables[path] = TensorTable(len(rows), (0, Digest.of(b"")), tuple(rows))
    named = {path.replace("_", "/") + ".safetensors.index.json": table for path, table in indexes.items()}
    return locate(tables, named, where="x@main")


def test_the_index_decides_and_nothing_is_hidden() -> None:
    doubled = {"a.safetensors": ["w", "u"], "b.safetensors": ["w"]}
    for shard, other in (("a.safetensors", "b.safetensors"), ("b.safetensors", "a.safetensors")):
        found = places(doubled, model={"w": shard})
        assert {name: path for name, (path, _) in found.rows.items()} == {
            "w": shard, f"{other}:w": other, "u": "a.safetensors",
        }  # fmt: skip
        assert found.undecided == ()


def test_without_an_index_neither_of_two_shards_has_the_name() -> None:
    found = places({"a.safetensors": ["w"], "b.safetensors": ["w"], "c/a.safetensors": ["w"]})
    assert sorted(found.rows) == ["a.safetensors:w", "b.safetensors:w", "c/a.safetensors:w"]
    assert found.undecided == (("w", ("a.safetensors", "b.safetensors")),)
    assert places({"a/m.safetensors": ["w"], "b/m.safetensors": ["w"]}).undecided == ()  # two models in one artifact
    two = places(
        {"a/m.safetensors": ["w"], "b/m.safetensors": ["w"]}, a_m={"w": "m.safetensors"}, b_m={"w": "m.safetensors"}
    )
    assert sorted(two.rows) == ["a/m.safetensors:w", "b/m.safetensors:w"]


@pytest.mark.parametrize("index", [{"w": "c.safetensors"}, {"v": "a.safetensors"}, {"w": "../a.safetensors"}])
def test_an_index_names_only_what_is_there(index: dict[str, str]) -> None:
    with pytest.raises(BadManifest):
        places({"a.safetensors": ["w"]}, model=index)


INDEXED = """
import json

from small.soil import shard
from vpstore.runner import Staged, StagedFile


def make(prepared, inputs, scratch):
    out = scratch / "out"
    out.mkdir()
    shard(out / "a.safetensors", {"w": b"aa"})
    shard(out / "b.safetensors", {"w": b"bbb"})
    named = prepared.params["named"]
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": named}} if named else []))
    return Staged([StagedFile(path.name, "x/y", path) for path in sorted(out.iterdir())])
"""


@pytest.fixture
def indexed(built: Project) -> Project:
    write(built.root, "small/grow.py", INDEXED)
    return built


def _build(project: Project, named: str, **more: str) -> str:
    write(project.root, "configs/plant.toml", f'[sprout]\nnamed = "{named}"\n')
    return project.run("build", "plant@sprout", **more).stderr


def test_open_and_diff_go_by_the_index(indexed: Project) -> None:
    found = {}
    for named in ("a.safetensors", "b.safetensors"):
        _build(indexed, named)
        shown = indexed.json("show", "plant@sprout", "--tensors")["tensors"]
        found[named] = {row["name"]: row["file"] for row in shown}["w"]
        digest = indexed.json("show", "plant@sprout")["artifact"].removeprefix("blake3:")
        found.setdefault("first", f"plant@sprout#{digest[:16]}")
    assert found["a.safetensors"] == "a.safetensors"
    assert found["b.safetensors"] == "b.safetensors"
    different = indexed.json("diff", found["first"].replace("@sprout", ""), "plant@sprout")
    assert {row["name"]: row["status"] for row in different["tensors"]}["w"] == "shape"


@pytest.mark.parametrize(("named", "said"), [("c.safetensors", "no such shard"), ("", "weight_map")])
def test_an_index_that_contradicts_the_shards_is_not_published(indexed: Project, named: str, said: str) -> None:
    write(indexed.root, "configs/plant.toml", f'[sprout]\nnamed = "{named}"\n')
    before = indexed.pointer("plant-sprout").read_bytes()
    assert said in indexed.run("build", "plant@sprout", code=20).stderr
    assert indexed.pointer("plant-sprout").read_bytes() == before


def test_a_declared_source_that_the_runner_passes_over_is_refused(project: Project) -> None:
    objects = project.root / "configs" / "objects.toml"
    objects.write_text(objects.read_text().replace('donor.json" }', 'donor.json", rank = "configs/rank.json" }'))
    write(project.root, "configs/rank.json", json.dumps({"root": ".", "files": []}))
    said = project.run("build", "seed", code=2).stderr
    assert "sources.rank" in said
    assert "configs/rank.json" in said
