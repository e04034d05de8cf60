"""why, diff and graph: over artifacts that differ in one thing each, and in nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import pytest
from damage_tools import flip
from forger import Forger
from orchard import RANKS
from small_project import Project

from vpstore.numbers import compare_tensors
from vpstore.schema.digest import Digest


def change(project: Project, path: str, before: str, after: str) -> None:
    target = project.root / path
    text = target.read_text()
    assert before in text
    target.write_text(text.replace(before, after))


def named(artifact: str, name: str = "graft") -> str:
    return f"{name}#{artifact[7:23]}"


def rebuilt(project: Project, *refs: str, **more: str) -> tuple[str, str]:
    """Build refs again, the last of them being compared.

    Returns: that one before and after, as refs by digest.
    """
    last = [ref for ref in refs if not ref.startswith("--")][-1]
    before = project.json("show", last)["artifact"]
    project.run("build", *refs, **more)
    after = project.json("show", last)["artifact"]
    assert before != after
    name = last.split("@")[0]
    return named(before, name), named(after, name)


def roots(document: Any) -> list[dict[str, Any]]:
    return [step for step in document["steps"] if step["root"]]


def reasons(step: dict[str, Any]) -> list[tuple[str, str]]:
    return [(reason["kind"], reason["name"]) for reason in step["reasons"]]


def test_one_artifact_has_no_reason_to_differ_from_itself(orchard: Project) -> None:
    assert orchard.json("why", "graft", "graft") == {"schema": 1, "same": True, "relation": None, "steps": []}
    assert orchard.run("why", "graft", "graft").stdout == "the same artifact\n"
    assert orchard.json("why", "graft", "--lock")["same"]
    assert orchard.json("diff", "graft", "graft")["identical"]


def test_a_param_is_named_by_its_path_with_both_values(orchard: Project) -> None:
    change(orchard, "configs/plant.toml", "step = 3", "step = 5\n[main.deep]\nvalue = 1")
    refs = rebuilt(orchard, "graft")
    (step,) = orchard.json("why", *refs)["steps"]
    assert step["root"]
    assert step["reasons"] == [
        {"kind": "param", "name": "deep.value", "after": 1},
        {"kind": "param", "name": "step", "before": 3, "after": 5},
    ]
    assert step["tensors"] == ["body"]
    assert set(step["files"]) == {"model.safetensors", "provenance.json", "reports/metrics.json"}
    text = orchard.run("why", *refs).stdout
    assert "param       step  3  ->  5" in text
    assert "param       deep.value  (none)  ->  1" in text


def test_a_recipe_file_is_named_and_shown_on_request(orchard: Project) -> None:
    change(orchard, "small/grow.py", 'grown["kept"] = parent["kept"]', 'grown["kept"] = bytes(32)')
    refs = rebuilt(orchard, "graft")
    (step,) = orchard.json("why", *refs, "--diff")["steps"]
    assert reasons(step) == [("recipe", "small/grow.py")]
    assert step["tensors"] == ["kept"]
    assert '-    grown["kept"] = parent["kept"]' in step["diff"]
    assert '+    grown["kept"] = bytes(32)' in step["diff"]
    assert "--- before/small/grow.py" in orchard.run("why", *refs, "--diff").stdout
    assert "--- before" not in orchard.run("why", *refs).stdout


def test_a_difference_far_up_is_traced_to_where_it_began(orchard: Project) -> None:
    change(orchard, "configs/plant.toml", "step = 1", "step = 8")
    refs = rebuilt(orchard, "plant@sprout", "plant@bloom", "graft")
    document = orchard.json("why", *refs)
    (root,) = roots(document)
    assert root["before"]["name"] == "plant@sprout"
    assert root["roles"] == ["data"]
    assert reasons(root) == [("param", "step")]
    assert reasons(document["steps"][0]) == [("input", "data"), ("input", "parent")]
    assert "because of data: plant@sprout " in orchard.run("why", *refs).stdout


def test_several_causes_are_all_found(orchard: Project) -> None:
    change(orchard, "configs/plant.toml", "step = 2", "step = 9")
    change(orchard, "configs/plant.toml", "step = 3", "step = 4")
    refs = rebuilt(orchard, "plant@bloom", "graft")
    found = {tuple(root["roles"]): reasons(root) for root in roots(orchard.json("why", *refs))}
    assert found == {(): [("param", "step"), ("input", "parent")], ("parent",): [("param", "step")]}


def test_a_source_and_a_tokenizer_are_named(orchard: Project) -> None:
    import hashlib

    ranks = b"other ranks\n"
    (orchard.root / "assets" / "leaf.tiktoken").write_bytes(ranks)
    change(orchard, "configs/ranks.json", hashlib.sha256(RANKS).hexdigest(), hashlib.sha256(ranks).hexdigest())
    change(orchard, "configs/ranks.json", f'"size_bytes": {len(RANKS)}', f'"size_bytes": {len(ranks)}')
    change(orchard, "configs/objects.toml", Digest.of(RANKS), Digest.of(ranks))
    refs = rebuilt(orchard, "leaves", "graft")
    document = orchard.json("why", *refs)
    by_name = {step["before"]["name"]: reasons(step) for step in document["steps"]}
    assert by_name["leaves@main"] == [("source", "ranks/leaf.tiktoken"), ("tokenizer", "digest")]
    assert by_name["graft@main"] == [("tokenizer", "digest"), ("input", "tokenizer")]


def test_only_the_environment_differs(orchard: Project) -> None:
    refs = rebuilt(orchard, "graft", "--force", SMALL_NOISE="1", SMALL_DEVICE="gpu")
    (step,) = orchard.json("why", *refs)["steps"]
    assert reasons(step) == [("bytes", "build key"), ("environment", "device")]
    text = orchard.run("why", *refs).stdout
    assert "same build key, other bytes" in text
    assert "environment device  cpu  ->  gpu" in text


def test_equal_environments_and_other_bytes_are_said_to_be_no_reproduction(orchard: Project) -> None:
    refs = rebuilt(orchard, "graft", "--force", SMALL_NOISE="1")
    assert "the attested environments are equal: the build does not reproduce, or one of them is forged" in (
        orchard.run("why", *refs).stdout
    )


def test_nothing_attested_is_said(orchard: Project, forger: Forger) -> None:
    new = forger.publish(forger.with_tensor(forger.manifest("graft-main")))
    shutil.rmtree(forger.store.attestations.folder(new))
    (step,) = orchard.json("why", "graft", f"graft#{new.hex}")["steps"]
    assert ("unknown", "environment") in reasons(step)


def test_two_stages_of_one_object_are_said_to_be_what_they_are(orchard: Project) -> None:
    document = orchard.json("why", "plant@sprout", "plant@bloom")
    assert document["relation"] == "plant@sprout is an ancestor of plant@bloom"
    (step,) = document["steps"]
    assert reasons(step) == [("object", "object@stage"), ("param", "step"), ("input", "parent")]


def test_why_against_the_lock_with_and_without_its_artifact(orchard: Project, forger: Forger) -> None:
    change(orchard, "configs/plant.toml", "step = 1", "step = 8")
    old = [forger.manifest(slug) for slug in ("plant-sprout", "graft-main")]
    rebuilt(orchard, "plant@sprout", "plant@bloom", "graft")
    (root,) = roots(orchard.json("why", "graft", "--lock"))
    assert (root["before"]["artifact"], reasons(root)) == (old[0].digest, [("param", "step")])
    for manifest in old:
        forger.forget(manifest)
    document = orchard.json("why", "graft", "--lock")
    assert [(row["name"], row["root"], row["words"]) for row in document["steps"]] == [
        ("plant@sprout", True, "other params"),
        ("plant@bloom", False, "as the lock says but for its parents"),
        ("graft@main", False, "as the lock says but for its parents"),
    ]
    text = orchard.run("why", "graft", "--lock").stdout
    assert "because of plant@sprout" in text
    assert "  and so graft@main" in text


def test_wrong_uses_are_refused_in_words(orchard: Project) -> None:
    orchard.run("why", "graft", code=2)
    orchard.run("why", "graft", "plant", "--lock", code=2)
    orchard.run("diff", "graft", code=2)
    orchard.run("why", "graft", "nothing", code=11)
    orchard.run("graph", "graft", "--dot", "--json", code=2)
    (orchard.root / "vpstore.lock").unlink()
    orchard.run("why", "graft", "--lock", code=11)


def test_why_goes_as_far_as_manifests_go(orchard: Project, forger: Forger) -> None:
    change(orchard, "configs/plant.toml", "step = 1", "step = 8")
    sprout = forger.artifact("plant-sprout")
    refs = rebuilt(orchard, "plant@sprout", "plant@bloom")
    orchard.blob(sprout).unlink()
    (root,) = roots(orchard.json("why", *refs))
    assert reasons(root) == [("unknown", "manifest")]
    assert (root["tensors"], root["files"]) == (None, None)
    text = orchard.run("why", *refs).stdout
    assert f"because of parent: {sprout.short}  ->  plant@sprout " in text
    assert "what lies behind it cannot be told (vpstore pull" in text


@pytest.mark.parametrize("refs", [("graft", "plant@bloom"), ("plant@bloom", "graft"), ("graft", "graft")])
@pytest.mark.parametrize("code", [12, 13])
def test_why_without_one_of_the_two_is_refused_as_diff_does(
    orchard: Project, forger: Forger, refs: tuple[str, str], code: int
) -> None:
    blob = orchard.blob(forger.artifact("graft-main"))
    blob.chmod(0o644)
    blob.unlink() if code == 12 else blob.write_bytes(b"{}")
    done = orchard.run("why", *refs, code=code)
    assert done.stdout == ""
    assert "manifest of graft" in done.stderr
    assert "next " in done.stderr
    assert done.stderr == orchard.run("diff", *refs, code=code).stderr


def test_why_gives_no_count_of_tensors_that_it_could_not_compare(orchard: Project, forger: Forger) -> None:
    change(orchard, "configs/plant.toml", "step = 3", "step = 5")
    table = forger.manifest("graft-main").by_path["model.safetensors"].tensors
    assert table is not None
    refs = rebuilt(orchard, "graft")
    orchard.blob(table).unlink()
    done = orchard.run("why", *refs)
    assert "tensors cannot be compared" in done.stderr
    assert "tensors differ" not in done.stdout
    assert "3 files differ" in done.stdout
    assert orchard.json("why", *refs)["steps"][0]["tensors"] is None


def rows(document: Any) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in document["tensors"]}


def test_diff_gives_the_figures_of_the_bytes(orchard: Project, forger: Forger) -> None:
    document = orchard.json("diff", "plant@sprout", "graft")
    assert list(rows(document)) == ["body"]
    row = rows(document)["body"]
    data = []
    for slug in ("plant-sprout", "graft-main"):
        shard = forger.store.blobs.path(forger.manifest(slug).by_path["model.safetensors"].digest).read_bytes()
        data.append(memoryview(shard)[-64:])
    expected = compare_tensors("U8", *data)
    assert row["status"] == "differs"
    assert (row["max_abs"], row["norm_difference"]) == (expected.max_abs, expected.norm_difference)
    assert row["max_abs"] == 5.0  # two steps of 2 and 3 on
    assert row["before"]["shape"] == [64]
    names = orchard.json("diff", "plant@sprout", "graft", "--all")
    assert {name: row["status"] for name, row in rows(names).items()} == {
        "body": "differs", "kept": "identical", "void": "identical",
    }  # fmt: skip
    text = orchard.run("diff", "plant@sprout", "graft").stdout
    assert "2 of 3 tensors and 0 of 3 files are identical" in text
    assert "kept" not in text
    assert "body" in text


def shard_of(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + b"".join(data for _, _, data in tensors.values())


def test_diff_says_what_cannot_be_subtracted(orchard: Project, forger: Forger) -> None:
    old = forger.manifest("graft-main")
    sides = []
    for tensors in (
        {"a": ("F32", [2], bytes(8)), "b": ("F32", [2], bytes(8)), "c": ("F16", [2], bytes(4)),
         "n": ("F32", [1], bytes(4)), "x": ("F32", [1], bytes(4)), "z": ("C64", [1], bytes(8))},
        {"a": ("BF16", [4], bytes(8)), "b": ("F32", [1, 2], bytes(8)), "c": ("F16", [2], bytes(4)),
         "n": ("F32", [1], b"\0\0\xc0\x7f"), "y\x1b": ("F32", [1], bytes(4)), "z": ("C64", [1], b"\1" * 8)},
    ):  # fmt: skip
        sides.append(forger.publish(forger.with_file(old, "model.safetensors", shard_of(tensors))))
    refs = [f"graft#{side.hex}" for side in sides]
    found = rows(orchard.json("diff", *refs, "--all"))
    assert {name: row["status"] for name, row in found.items()} == {
        "a": "dtype", "b": "shape", "c": "identical", "n": "differs", "x": "only before", "y\x1b": "only after",
        "z": "differs",
    }  # fmt: skip
    assert found["n"]["max_abs"] == "inf"
    assert found["z"]["max_abs"] is None
    text = orchard.run("diff", *refs).stdout
    assert "\x1b" not in text
    assert "y\\x1b" in text


def test_diff_believes_no_damaged_tensor(orchard: Project, forger: Forger) -> None:
    path = forger.store.blobs.path(forger.manifest("graft-main").by_path["model.safetensors"].digest)
    flip(path, path.stat().st_size - 1)
    orchard.run("diff", "plant@sprout", "graft", code=13)
    path.unlink()
    orchard.run("diff", "plant@sprout", "graft", code=12)


def test_diff_against_the_lock(orchard: Project) -> None:
    change(orchard, "configs/plant.toml", "step = 3", "step = 4")
    before, after = rebuilt(orchard, "graft")
    assert orchard.json("diff", "graft", "--lock") == orchard.json("diff", before, after)


def test_graph_as_tree_document_and_drawing(orchard: Project) -> None:
    tree = orchard.run("graph", "graft").stdout.splitlines()
    assert len(tree) == 5
    assert tree[0].startswith("graft@main  ")
    assert any(line.startswith("└─ parent  plant@bloom") for line in tree)
    document = orchard.json("graph", "graft")
    nodes = {row["artifact"]: row for row in document["nodes"]}
    assert document["artifact"] == list(nodes)[-1]
    for row in nodes.values():
        assert all(parent["artifact"] in nodes for parent in row["inputs"])
        assert row["locked"] == "same"
    drawing = orchard.run("graph", "graft", "--dot").stdout
    assert drawing.count("->") == sum(len(row["inputs"]) for row in nodes.values())
    if shutil.which("dot"):
        subprocess.run(["dot", "-Tsvg"], input=drawing, text=True, check=True, capture_output=True)


def test_graph_shows_what_is_missing(orchard: Project, forger: Forger) -> None:
    sprout = forger.artifact("plant-sprout")
    orchard.blob(sprout).unlink()
    document = orchard.json("graph", "graft")
    (row,) = [row for row in document["nodes"] if row["artifact"] == sprout]
    assert "does not hold" in row["fault"]
    assert "style=dashed" in orchard.run("graph", "graft", "--dot").stdout
    assert sprout.short in orchard.run("graph", "graft").stdout


def test_quotes_in_names_stay_inside_them() -> None:
    from vpstore.verbs.graph import _quoted

    assert _quoted('a"b\\', "c") == '"a\\"b\\\\\\nc"'


@pytest.mark.parametrize("command", ["audit", "graph", "why", "diff"])
def test_each_command_is_a_function_of_the_api(command: str) -> None:
    import vpstore.api

    assert callable(getattr(vpstore.api, command))
