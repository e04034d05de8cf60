"""What a key covers, and that nobody is believed who says otherwise."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from forger import Forger
from hypothesis import given
from hypothesis import strategies as st
from small_project import Project

from vpstore.errors import BadManifest, UsageError
from vpstore.schema.canonical import canonical_bytes, parse_canonical
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import Manifest
from vpstore.schema.typed import is_other, plain, typed, untyped

keys = st.text("abc.é", max_size=3)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
)


@given(values, values)
def test_two_values_never_share_a_document_and_each_comes_back(one: Any, other: Any) -> None:
    data = canonical_bytes(typed(plain(one, where="x")))
    again = untyped(parse_canonical(data, where="x"), where="x")
    assert repr(again) == repr(plain(one, where="x"))  # types, signs and the order of keys, too
    assert _shown(again) == _shown(one)
    assert is_other(one, other) == (_shown(one) != _shown(other))


def _shown(value: Any) -> str:
    """A value as Python shows it, tables by key."""
    if isinstance(value, dict):
        return f"table {sorted((key, _shown(inner)) for key, inner in value.items())}"
    return repr([_shown(inner) for inner in value]) if isinstance(value, list) else repr(value)


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (float("nan"), "p.a.b[1]"),
        (float("inf"), "p.a.b[1]"),
        (date(2026, 1, 1), "p.a.b[1]"),
        ({1, 2}, "p.a.b[1]"),
        (b"x", "p.a.b[1]"),
        ({1: 2}, "p.a.b[1]"),
        ({"$float": "1.0"}, "p.a.b[1]"),
        ("\ud800", "p.a.b[1]"),
    ],
)
def test_what_no_key_can_have_is_refused_by_name(value: Any, where: str) -> None:
    with pytest.raises(UsageError) as caught:
        plain({"a": {"b": [0, value]}}, where="p")
    assert caught.value.where == where


def set_bloom(project: Project, text: str) -> None:
    config = project.root / "configs" / "plant.toml"
    config.write_text(f"[sprout]\nstep = 1\n[bloom]\n{text}\n[main]\nstep = 3\n")


def key_of(project: Project, ref: str) -> str:
    return str(project.json("build", ref, "--dry-run")["builds"][0]["key"])


def test_a_recipe_gets_what_the_key_has_in_a_build_and_in_a_reproduction(orchard: Project, tmp_path: Path) -> None:
    seen = {}
    for text in ("2", "2.0", "-0.0", "0", "0.0", "true", "9007199254740993", "9007199254740992.0"):
        set_bloom(orchard, f"step = 2\nmore = {text}")
        seen[text] = key_of(orchard, "plant@bloom")
    assert len(set(seen.values())) == len(seen)
    set_bloom(orchard, "step = 2\nmore = [-0.0, 1e22, 3.0, 9007199254740993]")
    logs = [tmp_path / name for name in ("built", "again")]
    orchard.run("build", "plant", SMALL_LOG=str(logs[0]))
    orchard.run("reproduce", "plant", SMALL_LOG=str(logs[1]))
    assert logs[0].read_text() == logs[1].read_text()
    assert "[-0.0, 1e+22, 3.0, 9007199254740993]" in logs[0].read_text()
    set_bloom(orchard, "step = 2\nmore = nan")
    assert "params of plant@bloom.more" in orchard.run("build", "plant", code=2).stderr


LOOK = """
    seen = {"role": inputs["parent"].role, "ref": inputs["parent"].ref, "artifact": inputs["parent"].artifact,
            "files": sorted(os.listdir(inputs["parent"].path)), "doc": make.__doc__}
    (scratch / "seen.json").write_text(json.dumps(seen))
    return Staged(["""


def test_a_recipe_sees_of_a_parent_what_the_key_covers(orchard: Project, forger: Forger) -> None:
    recipe, objects = orchard.root / "small/grow.py", orchard.root / "configs/objects.toml"
    text = (
        recipe.read_text()
        .replace("\n    return Staged(\n        [", LOOK)
        .replace(
            'StagedFile("model',
            'StagedFile("seen.json", "application/json", scratch / "seen.json"),\n         StagedFile("model',
            1,
        )
    )
    recipe.write_text(text.replace("scratch):\n", 'scratch):\n    """Grow."""\n', 1))
    orchard.run("build", "plant@sprout")
    orchard.run("build", "plant@bloom")
    parent = forger.manifest("plant-sprout")

    def seen() -> Any:
        row = forger.manifest("plant-bloom").by_path["seen.json"]
        return json.loads(orchard.blob(row.digest).read_text())

    files = sorted({row.path.split("/")[0] for row in parent.files} - {"provenance.json"})
    assert seen() == {
        "role": "parent", "ref": "parent", "artifact": parent.content, "files": files, "doc": None,
    }  # fmt: skip
    before = key_of(orchard, "plant@bloom")
    written = objects.read_text()
    objects.write_text(
        written.replace('{ parent = "plant.green" }', '{ parent = { ref = "plant.green", by = "artifact" } }')
    )
    assert key_of(orchard, "plant@bloom") != before
    orchard.run("build", "plant@bloom")
    assert (seen()["ref"], seen()["artifact"]) == ("plant@sprout", parent.digest)
    assert forger.manifest("plant-bloom").build.inputs[0].by == "artifact"
    (orchard.root / "vpstore.lock").unlink()
    orchard.run("reproduce", "plant@bloom")
    orchard.run("lock", "plant@sprout")
    chain = orchard.json("audit", "plant@bloom")["chain"]
    assert {row["stage"]: row["vouched"] for row in chain} == {
        "main": "claimed", "sprout": "locked", "bloom": "reproduced",
    }  # fmt: skip
    objects.write_text(
        written.replace('{ parent = "plant.green" }', '{ parent = { ref = "plant.green", by = "name" } }')
    )
    orchard.run("build", "plant@bloom", code=2)


def other_code(forger: Forger, manifest: Manifest) -> Manifest:
    """Another recipe under the code of the true one."""
    evil = forger.store.blobs.put_bytes(b"def make(*given):\n    return 'something else'\n")
    files = tuple(
        row._replace(digest=evil) if row.path == "small/grow.py" else row for row in manifest.build.recipe_files
    )
    return forger.with_build(manifest, replace(manifest.build, recipe_files=files))


def other_parent(forger: Forger, manifest: Manifest) -> Manifest:
    """Another parent under the content of the true one."""
    wrong = forger.artifact("seed-main")
    inputs = tuple(row._replace(artifact=wrong) for row in manifest.build.inputs)
    return forger.with_build(manifest, replace(manifest.build, inputs=inputs))


@pytest.mark.parametrize("lie", [other_code, other_parent])
def test_a_claim_that_is_not_true_is_a_bad_manifest_everywhere(orchard: Project, forger: Forger, lie: Any) -> None:
    true = forger.manifest("plant-bloom")
    made = lie(forger, true)
    assert made.build.key() == true.build.key()
    forger.publish(made)
    forger.point(made)
    forger.accept(made)
    forger.forget(true)
    for command in (["build", "plant"], ["verify", "plant"], ["audit", "plant"]):
        said = orchard.run(*command, code=14)
        assert (
            "of recipe file small/grow.py" in said.stdout + said.stderr
            or "of input parent" in said.stdout + said.stderr
        )
    orchard.run("reproduce", "plant", code=14)
    orchard.run("build", "plant", "--force")
    assert forger.artifact("plant-bloom") == true.digest


def test_a_content_that_is_not_that_of_the_files_is_no_manifest(forger: Forger) -> None:
    document = json.loads(forger.manifest("plant-bloom").encoded)
    document["content"] = Digest.of(b"x")
    with pytest.raises(BadManifest, match="contradicts"):
        Manifest.decode(canonical_bytes(document), where="test")


def in_first_format(manifest: Manifest) -> Manifest:
    """The same artifact as the first format had it."""
    build = manifest.build
    files = tuple(row._replace(code=None) for row in build.recipe_files)
    inputs = tuple(row._replace(content=None) for row in build.inputs)
    return replace(manifest, build=replace(build, recipe_files=files, inputs=inputs, format=1))


def test_a_chain_of_both_formats(orchard: Project, forger: Forger) -> None:
    """A store from before: all of it is read, and what is built now may have parents of then."""
    (orchard.store / "format").write_text("vpstore 1\n")
    for slug in ("seed-main", "plant-sprout"):
        old = forger.manifest(slug)
        renamed = {row.artifact: forger.artifact("seed-main") for row in old.build.inputs}
        inputs = tuple(row._replace(artifact=renamed[row.artifact]) for row in old.build.inputs)
        first = in_first_format(replace(old, build=replace(old.build, inputs=inputs)))
        if "provenance.json" in first.by_path:
            first = forger.with_file(first, "provenance.json", first.build.readable())
        forger.publish(first)
        pointer = {"format": 1, "object": first.object, "stage": first.stage, "artifact": first.digest}
        orchard.pointer(slug).write_text(json.dumps({**pointer, "key": first.build.key()}))
        assert first.content == old.content
        assert Manifest.decode(first.encoded, where="test").verbatim == old.verbatim
    (orchard.root / "vpstore.lock").unlink()
    orchard.run("verify", "seed", "plant@sprout")
    orchard.run("audit", "plant@sprout")
    orchard.run("reproduce", "plant@sprout")
    set_bloom(orchard, "step = 9")
    orchard.run("build", "plant@bloom")
    assert (orchard.store / "format").read_text() == "vpstore 2\n"
    assert [row.artifact for row in forger.manifest("plant-bloom").build.inputs] == [
        json.loads(orchard.pointer("plant-sprout").read_text())["artifact"]
    ]
    for command in (["verify", "--all"], ["audit", "plant@bloom"], ["reproduce", "plant@bloom", "--chain"], ["gc"]):
        orchard.run(*command)
    orchard.run("lock")
    orchard.run("resolve", "plant@sprout", "--locked")


def test_of_two_histories_the_own_one_is_taken_and_then_the_locks(orchard: Project, forger: Forger) -> None:
    recipe = orchard.root / "small" / "grow.py"
    first, text = forger.artifact("plant-bloom"), recipe.read_text()
    recipe.write_text(text + "# another history\n")
    orchard.run("build", "plant@bloom", "--force")
    second = forger.artifact("plant-bloom")
    assert first != second
    recipe.write_text(text)
    orchard.run("build", "plant@bloom")
    assert forger.artifact("plant-bloom") == first  # this very history
    recipe.write_text(text + "# a third one\n")
    orchard.run("build", "plant@bloom")
    assert forger.artifact("plant-bloom") == first  # the lock's
    (orchard.root / "vpstore.lock").unlink()
    recipe.write_text(text + "# another history\n")
    orchard.run("build", "plant@bloom")
    recipe.write_text(text + "# a third one\n")
    orchard.run("build", "plant@bloom")
    assert forger.artifact("plant-bloom") == second  # the pointer's
