"""The walk from an artifact to its donors, over manifests that are whole, missing, shared, too many or in a circle."""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path

from small_project import Project

from vpstore.errors import BlobMissing
from vpstore.lineage import tensor_rows, walk, walk_all
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import BuildRecord, InputRecord, Manifest
from vpstore.storage.stamps import Stamps
from vpstore.storage.store import Store


class Shelf:
    """Manifests under names of the test's choice, so that circles can be made, which no hash function allows."""

    def __init__(self, parents: dict[str, list[str]]) -> None:
        self.parents = parents
        self.reads: list[str] = []

    @staticmethod
    def name(text: str) -> Digest:
        return Digest.of(text.encode())

    def manifest(self, artifact: Digest, *, what: str = "") -> Manifest:
        for name, parents in self.parents.items():
            if self.name(name) == artifact:
                self.reads.append(name)
                rows = enumerate(map(self.name, parents))
                inputs = tuple(InputRecord(f"role{number}", parent, parent) for number, parent in rows)
                return Manifest(name, "main", BuildRecord("x", (), {}, inputs), ())
        raise BlobMissing("the store does not hold a blob", found="nothing")


def test_parents_come_first_and_each_manifest_is_read_once() -> None:
    shelf = Shelf({"d": [], "c": ["d"], "b": ["d", "c"], "a": ["b", "c", "d"]})
    lineage = walk(shelf, Shelf.name("a"))
    order = [node.artifact for node in lineage]
    assert order[-1] == lineage.top == Shelf.name("a")
    for node in lineage:
        assert all(order.index(row.artifact) < order.index(node.artifact) for row in node.inputs)
    assert sorted(shelf.reads) == ["a", "b", "c", "d"]


def test_several_lineages_share_what_was_read() -> None:
    shelf = Shelf({"d": [], "c": ["d"], "b": ["d"]})
    first, second = walk_all(shelf, [Shelf.name("b"), Shelf.name("c")])
    assert ([node.name for node in first], [node.name for node in second]) == (
        ["d@main", "b@main"],
        ["d@main", "c@main"],
    )
    assert sorted(shelf.reads) == ["b", "c", "d"]


def test_a_missing_parent_is_a_node_with_a_reason() -> None:
    lineage = walk(Shelf({"a": ["gone", "b"], "b": []}), Shelf.name("a"))
    gone = lineage.nodes[Shelf.name("gone")]
    assert gone.manifest is None
    assert "does not hold" in gone.reason
    assert len(lineage) == 3
    assert [line.node.name for line in lineage.tree()] == ["a@main", gone.name, "b@main"]


def test_a_circle_ends_the_walk() -> None:
    lineage = walk(Shelf({"a": ["b"], "b": ["c"], "c": ["a", "c"]}), Shelf.name("a"))
    assert len(lineage) == 3
    assert [line.node.name for line in lineage.tree()] == ["a@main", "b@main", "c@main"]


def test_a_lineage_without_end_is_cut() -> None:
    parents = {f"n{number}": [f"n{number + 1}"] for number in range(50)}
    lineage = walk(Shelf(parents), Shelf.name("n0"), limit=20)
    cut = [node for node in lineage if node.manifest is None]
    assert len(lineage) == 21
    assert len(cut) == 1
    assert "more than 20" in cut[0].reason
    assert len(walk(Shelf(parents), Shelf.name("n0"), limit=60)) == 51


def test_a_limit_met_in_one_lineage_is_not_held_against_another() -> None:
    parents = {"a": ["b"], "b": ["c"], "c": []}
    first, second = walk_all(Shelf(parents), [Shelf.name("a"), Shelf.name("b")], limit=2)
    assert [node.reason != "" for node in first] == [True, False, False]
    assert [node.reason for node in second] == ["", ""]


def test_a_long_line_needs_no_deep_stack() -> None:
    parents = {f"n{number}": [f"n{number + 1}"] for number in range(60)} | {"n60": []}
    shelf = Shelf(parents)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 45)
    try:
        lineage = walk(shelf, Shelf.name("n0"))
    finally:
        sys.setrecursionlimit(limit)
    assert len(lineage.tree()) == 61


def test_the_tree_shows_every_artifact_once() -> None:
    shelf = Shelf({"t": [], "d": ["t"], "p": ["t", "d"], "a": ["p", "d", "t"]})
    lines = walk(shelf, Shelf.name("a")).tree()
    assert [line.node.name for line in lines] == ["a@main", "t@main", "d@main", "p@main"]
    assert [line.indent for line in lines] == ["", "├─ ", "├─ ", "└─ "]
    assert [line.above for line in lines] == [(), (), ("role0",), ("role0", "role1")]


def store_of(project: Project, tmp_path: Path) -> Store:
    return Store.open(project.store, stamps=Stamps(tmp_path / "stamps"))


def test_a_real_chain_leads_to_the_donor(built: Project, tmp_path: Path) -> None:
    store = store_of(built, tmp_path)
    top = Digest(built.json("show", "reports@plant-bloom")["artifact"])
    assert [node.name for node in walk(store, top)] == [
        "seed@main",
        "plant@sprout",
        "plant@bloom",
        "reports@plant-bloom",
    ]


def test_a_damaged_manifest_hides_its_ancestors_and_says_so(built: Project, tmp_path: Path) -> None:
    sprout = built.json("show", "plant@sprout")["artifact"]
    top = Digest(built.json("show", "plant")["artifact"])
    path = built.blob(sprout)
    os.chmod(path, 0o644)
    path.write_bytes(path.read_bytes().replace(b"small.grow", b"small.grov"))
    lineage = walk(store_of(built, tmp_path), top)
    assert [(node.artifact, bool(node.reason)) for node in lineage] == [(sprout, True), (top, False)]


def test_tensor_rows_name_the_shard_of_each_tensor(built: Project, tmp_path: Path) -> None:
    store = store_of(built, tmp_path)
    manifest = store.manifest(Digest(built.json("show", "plant")["artifact"]))
    rows = tensor_rows(store, manifest)
    assert sorted(rows) == ["body", "kept", "void"]
    assert {file.path for file, _ in rows.values()} == {"model.safetensors"}
