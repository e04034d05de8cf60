"""Pointers, claims, locks, views and inputs that were changed behind the store's back: none is believed."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from damage_tools import file_of, flip, shown, tensor_begin
from small_project import Project

import vpstore
from vpstore.errors import DigestMismatch, NoSuchRef
from vpstore.schema.canonical import canonical_bytes
from vpstore.schema.digest import Digest

if TYPE_CHECKING:
    from vpstore.verbs.reading import Artifact


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_pointer_edited_by_hand_leads_nowhere(built: Project) -> None:
    pointer = built.pointer("plant-bloom")
    original = pointer.read_text()
    sprout = built.pointed("plant-sprout")
    pointer.write_text(json.dumps(built.pointed("plant-bloom")))
    built.run("resolve", "plant")  # the first format, with the artifact in the pointer
    edit(pointer, artifact=sprout["artifact"])
    built.run("resolve", "plant", code=14)
    built.run("verify", "plant", code=3)
    edit(pointer, artifact="blake3:" + "0" * 64)
    built.run("resolve", "plant", code=12)
    edit(pointer, artifact="blake3:" + "0" * 64, stage="sprout")
    built.run("resolve", "plant", code=14)
    for text in ("", "{}", "[]", original.replace('"format": 2', '"format": 3'), original + original):
        pointer.write_text(text)
        built.run("resolve", "plant", code=14)
        built.run("verify", "plant", code=3)
    assert built.json("build", "plant")["builds"][0]["cached"]
    assert pointer.read_text() == original
    beside = pointer.with_suffix(".artifact")
    known = beside.read_text()
    for text in ("", "{}", '{"artifacts": [], "format": 2}', known.replace("bloom", "x")[:-9]):
        beside.write_text(text)
        built.run("resolve", "plant", code=14)
        assert built.json("build", "plant")["builds"][0]["cached"]
        assert beside.read_text() == known
    edit(pointer, content="blake3:" + "0" * 64)
    built.run("resolve", "plant", code=14)
    pointer.write_text(original)
    for part, value in (("content", "blake3:" + "0" * 64), ("key", sprout["key"])):
        pointer.write_text(original.replace(json.loads(original)[part], value))
        beside.write_text(known.replace(json.loads(original)[part], value))
        built.run("resolve", "plant", code=14)
        built.run("verify", "plant", code=3)
    pointer.write_text(json.dumps(built.pointed("plant-bloom")))
    edit(pointer, key=sprout["key"])
    built.run("verify", "plant", code=3)
    built.run("resolve", "plant", code=14)


def test_a_forged_artifact_under_a_key_is_not_taken(built: Project) -> None:
    """Somebody puts another artifact into the store and claims that the key gave it: its manifest says otherwise."""
    document = shown(built)
    bloom, sprout = document["artifact"], built.json("show", "plant@sprout")["artifact"]
    key = document["key"]
    folder = built.store / "keys" / key[7:9] / key[7:]
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / sprout[7:]).write_bytes(canonical_bytes({"format": 1, "key": key, "artifact": sprout}))
    row = built.json("build", "plant")["builds"][0]
    assert (row["cached"], row["artifact"]) == (False, bloom)


def test_a_forged_claim_with_a_forged_attestation_is_not_taken(built: Project) -> None:
    """An older result of the stage is attested and claimed under the new key: its manifest still has the old one."""
    old = shown(built)
    config = built.root / "configs" / "plant.toml"
    config.write_text(config.read_text().replace("step = 2", "step = 3"))
    new_key = built.json("build", "plant", "--dry-run")["builds"][0]["key"]
    statement = old["attestations"][0]
    statement["predicate"]["buildDefinition"]["externalParameters"]["build_key"] = new_key
    data = canonical_bytes(statement)
    (built.store / "attestations" / old["artifact"][7:] / f"{Digest.of(data).hex}.json").write_bytes(data)
    claim = built.store / "keys" / new_key[7:9] / new_key[7:] / old["artifact"][7:]
    claim.parent.mkdir(parents=True)
    claim.write_bytes(canonical_bytes({"format": 1, "key": new_key, "artifact": old["artifact"]}))
    row = built.json("build", "plant")["builds"][0]
    assert not row["cached"]
    assert row["artifact"] != old["artifact"]


def test_a_damaged_lock_is_refused(built: Project) -> None:
    built.run("lock")
    lock = built.root / "vpstore.lock"
    lock.write_text(lock.read_text()[:-3])
    for command in (["resolve", "plant"], ["ls"], ["lock"], ["build", "plant"]):
        built.run(*command, code=14)


def test_a_store_of_another_format_is_refused(built: Project) -> None:
    (built.store / "format").chmod(0o644)
    (built.store / "format").write_text("vpstore 3\n")
    for command in (["resolve", "plant"], ["ls"], ["build", "plant"], ["verify"]):
        built.run(*command, code=10)


def view_of(project: Project) -> Path:
    return Path(project.run("resolve", "plant").stdout.strip())


def test_a_deleted_view_comes_back(built: Project) -> None:
    view = view_of(built)
    shutil.rmtree(view)
    assert view_of(built) == view
    assert (view / "model.safetensors").read_bytes()


@pytest.mark.parametrize("change", ["edited", "foreign", "missing", "retargeted", "folder"])
def test_a_changed_view_is_noticed_and_shown_anew(built: Project, change: str) -> None:
    view = view_of(built)
    file = view / "reports" / "metrics.json"
    original = file.read_bytes()
    match change:
        case "edited":
            file.unlink()
            file.write_text("mine")
        case "foreign":
            (view / "notes.txt").write_text("mine")
        case "missing":
            file.unlink()
        case "retargeted":
            other = (view / "provenance.json").resolve()
            file.unlink()
            file.symlink_to(other)
        case "folder":
            shutil.move(view / "reports", built.root / "reports-moved")
            (view / "reports").symlink_to(built.root / "reports-moved")
    if change != "folder":
        assert any("view" in fault["where"] for fault in built.json("verify", "plant", code=3)["faults"])
    done = built.run("resolve", "plant")
    assert done.stdout.strip() == str(view)
    assert file.read_bytes() == original
    assert not (view / "notes.txt").exists()
    assert not (view / "reports").is_symlink()
    kept = [path for path in view.parent.iterdir() if ".changed-" in path.name]
    assert len(kept) == (0 if change in ("missing", "retargeted") else 1)  # what a person made is not thrown away
    built.run("verify", "plant")


def test_a_write_through_a_view_is_found(built: Project) -> None:
    """A link leads to the blob; whoever may overwrite that is found out by the next reader."""
    target = (view_of(built) / "model.safetensors").resolve()
    flip(target, tensor_begin(built, "body"))
    built.run("resolve", "plant", code=13)


def test_no_view_is_a_hard_link(built: Project) -> None:
    for blob in (built.store / "blobs").rglob("*"):
        assert not blob.is_file() or blob.stat().st_nlink == 1


def test_a_wiped_store_under_present_pointers_is_noticed_and_built_again(built: Project) -> None:
    before = built.listing()
    shutil.rmtree(built.store)
    built.run("resolve", "plant", code=10)
    built.run("build", "seed")
    built.run("resolve", "plant", code=12)
    rows = built.json("build", "--all")["builds"]
    assert [row["cached"] for row in rows] == [True, False, False, False, False]
    after = built.listing()
    assert {path for path in before if "/blobs/" in path} == {path for path in after if "/blobs/" in path}
    built.run("verify", "--all")


def test_an_input_that_is_damaged_is_refused_before_the_recipe_runs(built: Project, tmp_path: Path) -> None:
    document = built.json("show", "plant@sprout")
    flip(built.blob(file_of(document, "model.safetensors")["digest"]), 40)
    log = tmp_path / "log"
    done = built.run("build", "plant", "--force", code=13, SMALL_LOG=str(log))
    assert "plant@bloom, input parent" in done.stderr
    assert not log.exists()


def test_a_stamp_is_not_believed_after_a_change_and_full_believes_none(built: Project) -> None:
    built.run("resolve", "plant")
    built.run("resolve", "plant", "--full")
    path = built.blob(file_of(shown(built), "model.safetensors")["digest"])
    flip(path, 200)
    built.run("resolve", "plant", code=13)
    built.run("resolve", "plant", "--full", code=13)


def opened(project: Project, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    monkeypatch.chdir(project.root)
    monkeypatch.setenv("XDG_CACHE_HOME", str(project.cache))
    monkeypatch.delenv("VPSTORE_ROOT", raising=False)
    return vpstore.open("plant#" + project.json("resolve", "plant")["artifact"][7:27])


def test_an_open_artifact_is_a_mapping(built: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = opened(built, monkeypatch)
    assert "nosuch" not in artifact
    assert "kept" in artifact
    assert 3 not in artifact
    assert artifact.get("nosuch") is None
    assert artifact.get("nosuch", 5) == 5
    for name in ("nosuch", 3, None, ("a", "b")):
        with pytest.raises(KeyError) as caught:
            artifact[name]
        assert isinstance(caught.value, NoSuchRef)
        assert str(caught.value).startswith("error: no such tensor")
        assert pickle.loads(pickle.dumps(caught.value)).rows() == caught.value.rows()
    assert set(artifact.keys()) == {name for name, _ in artifact.items()} == {"body", "kept", "void"}
    flip(built.blob(file_of(shown(built), "model.safetensors")["digest"]), tensor_begin(built, "body"))
    assert "body" in artifact
    with pytest.raises(DigestMismatch):
        artifact.get("body")
    with pytest.raises(DigestMismatch):
        dict(artifact)


def test_open_gives_verified_tensors(built: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = opened(built, monkeypatch)
    assert list(artifact) == ["body", "kept", "void"]
    kept = artifact["kept"]
    assert (kept.dtype, kept.shape, bytes(kept.data)) == ("U8", (32,), bytes(range(32)))
    assert artifact["void"].shape == (0,)
    with pytest.raises(NoSuchRef):
        artifact["nothing"]
    flip(built.blob(file_of(shown(built), "model.safetensors")["digest"]), tensor_begin(built, "body"))
    with pytest.raises(DigestMismatch):
        artifact["body"]
    assert bytes(artifact["kept"].data) == bytes(range(32))
    assert Digest.of(artifact["kept"].data) == Digest.of(bytes(range(32)))
