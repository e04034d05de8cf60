"""Forgeries that leave nothing in the store that contradicts itself: what shows each, and what would hide it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest
from forger import Forger, overwrite
from small_project import Project

from vpstore.schema.digest import Digest
from vpstore.schema.manifest import Manifest, RecipeFile, SourceRecord
from vpstore.storage.pointers import Pointer


def kinds(project: Project, *options: str, ref: str = "graft") -> set[tuple[str, str]]:
    """(kind, where) of every fault; there must be some."""
    document = project.json("audit", ref, *options, code=3)
    return {(fault["kind"], fault["where"]) for fault in document["faults"]}


def is_sound(project: Project, ref: str = "graft") -> bool:
    return bool(project.json("audit", ref)["ok"])


def test_bytes_overwritten_and_registered_again_are_not_the_locks(orchard: Project, forger: Forger) -> None:
    """The first DVC forgery: an output is overwritten and committed again. Here: blob, table, manifest, attestation,
    key file and pointer all say the same afterwards, and the true artifact is gone."""
    new = forger.replace_artifact("graft-main", forger.with_tensor)
    orchard.run("verify", "graft")  # nothing in the store contradicts anything
    orchard.run("resolve", "graft")
    assert kinds(orchard) == {("lock", "graft@main: lock")}
    forger.accept(new)  # the lock is the witness: whoever changes it, too, is seen by git, and by nothing here
    assert is_sound(orchard)


def test_overwritten_bytes_show_in_the_children_that_recorded_their_parent(orchard: Project, forger: Forger) -> None:
    forger.replace_artifact("plant-bloom", forger.with_tensor)
    found = orchard.json("audit", "graft", code=3)["faults"]
    assert {(fault["kind"], fault["found"]) for fault in found} == {("missing", "missing")}


def test_overwritten_bytes_show_in_the_true_artifact_of_the_key_even_without_a_lock(
    orchard: Project, forger: Forger
) -> None:
    (orchard.root / "vpstore.lock").unlink()
    old = forger.manifest("graft-main")
    new = forger.with_tensor(old)
    forger.publish(new)
    forger.point(new)
    remarks = orchard.json("audit", "graft")["remarks"]
    assert any(old.digest.short in text and "does not reproduce, or one is forged" in text for text in remarks)


def test_a_view_written_through_shows_in_the_blob(orchard: Project, forger: Forger) -> None:
    path = orchard.blob(forger.manifest("graft-main").by_path["model.safetensors"].digest)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    overwrite(path, bytes(data))
    assert kinds(orchard) == {("blob", "graft@main: model.safetensors")}


def test_a_pointer_edited_by_hand_is_found(orchard: Project, forger: Forger) -> None:
    """The second DVC forgery, on the pointer: to another stage, to another artifact of the stage, the key alone."""
    true, bloom = forger.manifest("graft-main"), forger.manifest("plant-bloom")
    pointer = orchard.pointer("graft-main")
    original = pointer.read_bytes()
    forger.pointers.write(Pointer(true.ref, bloom.digest, bloom.build.key()))
    assert kinds(orchard) == {("registry", "plant@bloom: pointer of graft@main")}
    forger.pointers.write(Pointer(true.ref, true.digest, bloom.build.key()))
    assert kinds(orchard) == {("registry", "graft@main: weights/tiny/refs/graft-main.json, key")}
    config = orchard.root / "configs" / "plant.toml"
    config.write_text(config.read_text().replace("step = 3", "step = 5"))
    orchard.run("build", "graft")  # another valid artifact of the same stage, as from an older time
    config.write_text(config.read_text().replace("step = 5", "step = 3"))
    assert kinds(orchard) == {("lock", "graft@main: lock")}
    pointer.write_bytes(original)
    assert is_sound(orchard)


@pytest.mark.parametrize("part", ["content", "key", "code", "params"])
@pytest.mark.parametrize("slug", ["graft-main", "plant-sprout"])
def test_a_lock_edited_by_hand_is_found(orchard: Project, forger: Forger, part: str, slug: str) -> None:
    """The second DVC forgery, on the lock: each part alone, of what is audited and of an ancestor."""
    other = forger.manifest("plant-bloom")
    values = {"content": other.content, "key": other.build.key(), "code": Digest.of(b"x"), "params": Digest.of(b"x")}
    ref = str(forger.manifest(slug).ref)
    forger.edit_lock(ref, **{part: values[part]})
    found = kinds(orchard)
    assert {where.split(":")[0] for _, where in found} == {ref}
    assert {kind for kind, _ in found} == {"registry"}


def test_a_lock_with_another_artifact_of_equal_key_and_content_is_another_history(
    orchard: Project, forger: Forger
) -> None:
    forger.edit_lock("graft@main", artifact=Digest.of(b"x"))
    assert is_sound(orchard)
    assert any("with another history" in remark for remark in orchard.json("audit", "graft")["remarks"])


def test_a_lock_entry_taken_from_another_build_is_found_in_all_its_parts(orchard: Project, forger: Forger) -> None:
    forger.edit_lock("plant@sprout", key=forger.manifest("plant-bloom").build.key(), artifact=Digest.of(b"x"))
    assert kinds(orchard) == {("lock", "plant@sprout: lock")}


def test_swapped_parents_are_found(orchard: Project, forger: Forger) -> None:
    """Two inputs in each other's roles, with key, provenance and registration made anew, and the lock edited, too."""

    def swap(manifest: Manifest) -> Manifest:
        by_role = {row.role: row.artifact for row in manifest.build.inputs}
        swapped = {**by_role, "parent": by_role["data"], "data": by_role["parent"]}
        inputs = tuple(forger.parent(role, artifact) for role, artifact in swapped.items())
        return forger.with_build(manifest, replace(manifest.build, inputs=inputs))

    new = forger.replace_artifact("graft-main", swap)
    expected = {("input", "graft@main: input data"), ("input", "graft@main: input parent")}
    assert kinds(orchard) == {*expected, ("lock", "graft@main: lock")}
    forger.accept(new)
    assert kinds(orchard) == expected


@pytest.mark.parametrize("ref", ["leaves-main", "graft-main"])
def test_a_parent_of_another_object_is_found(orchard: Project, forger: Forger, ref: str) -> None:
    """Replaced by a valid artifact of another object, also by one of the same object and another stage."""
    wrong = forger.artifact("leaves-main" if ref == "leaves-main" else "plant-sprout")
    new = forger.relink("graft-main", forger.artifact("plant-bloom"), wrong)
    forger.accept(new)
    assert ("input", "graft@main: input parent") in kinds(orchard)


def test_an_input_more_or_less_is_found(orchard: Project, forger: Forger) -> None:
    def drop(manifest: Manifest) -> Manifest:
        kept = tuple(row for row in manifest.build.inputs if row.role != "data")
        more = forger.parent("extra", manifest.build.inputs[0].artifact)
        return forger.with_build(manifest, replace(manifest.build, inputs=(*kept, more)))

    forger.accept(forger.replace_artifact("graft-main", drop))
    assert kinds(orchard) == {("input", "graft@main: input data"), ("input", "graft@main: input extra")}


def relinked_chain(forger: Forger, change: Any) -> list[Manifest]:
    """Change plant@sprout and re-link everything above it, up to the pointer of graft."""
    old = [forger.manifest(slug) for slug in ("plant-sprout", "plant-bloom", "graft-main")]
    sprout = forger.replace_artifact("plant-sprout", change)
    bloom = forger.relink("plant-bloom", old[0].digest, sprout.digest)

    def change_graft(manifest: Manifest) -> Manifest:
        renamed = {old[0].digest: sprout.digest, old[1].digest: bloom.digest}
        inputs = tuple(
            forger.parent(row.role, renamed.get(row.artifact, row.artifact)) for row in manifest.build.inputs
        )
        return forger.with_build(manifest, replace(manifest.build, inputs=inputs))

    return [sprout, bloom, forger.replace_artifact("graft-main", change_graft)]


def test_a_manifest_edited_with_its_children_linked_again_is_found_where_it_was_edited(
    orchard: Project, forger: Forger
) -> None:
    forged = relinked_chain(forger, forger.with_tensor)
    orchard.run("verify", "graft", "plant@bloom", "plant@sprout")
    assert kinds(orchard) == {("lock", "plant@sprout: lock")}
    assert len(kinds(orchard, "--locked")) == 3
    for manifest in forged:
        forger.accept(manifest)
    assert is_sound(orchard)  # without lock and signature nothing can tell


def test_an_edited_build_record_with_everything_linked_again_is_found(orchard: Project, forger: Forger) -> None:
    """Here the params, as if another step had been taken: the key changes with them."""

    def change(manifest: Manifest) -> Manifest:
        return forger.with_build(manifest, replace(manifest.build, params={"step": 9}))

    forged = relinked_chain(forger, change)
    assert kinds(orchard) == {("lock", "plant@sprout: lock")}
    assert kinds(orchard, "--other-machine") == {("lock", "plant@sprout: lock")}
    for manifest in forged:
        forger.accept(manifest)
    document = orchard.json("audit", "graft")
    assert [row["stale"] for row in document["chain"] if row["stage"] == "sprout"] == [["params: step"]]


def test_a_manifest_edited_without_its_registration_is_found_many_times(orchard: Project, forger: Forger) -> None:
    manifest = forger.with_tensor(forger.manifest("graft-main"))
    forger.store.blobs.put_bytes(manifest.encoded)
    forger.point(manifest)
    assert kinds(orchard) == {
        ("lock", "graft@main: lock"),
        ("registry", "graft@main: key file"),
        ("attestation", "graft@main: attestations"),
    }


def test_an_old_provenance_in_a_new_manifest_is_found(orchard: Project, forger: Forger) -> None:
    def change(manifest: Manifest) -> Manifest:
        return replace(manifest, build=replace(manifest.build, params={"step": 9}))

    forger.accept(forger.replace_artifact("graft-main", change))
    assert kinds(orchard) == {("provenance", "graft@main: provenance.json")}


def test_the_table_of_another_shard_is_found(orchard: Project, forger: Forger) -> None:
    other = forger.manifest("plant-bloom").by_path["model.safetensors"].tensors

    def change(manifest: Manifest) -> Manifest:
        rows = (replace(row, tensors=other) if row.tensors else row for row in manifest.files)
        return replace(manifest, files=tuple(rows))

    forger.accept(forger.replace_artifact("graft-main", change))
    assert kinds(orchard) == {("table", "graft@main: model.safetensors, tensor table")}
    found = orchard.json("audit", "graft", code=3)["faults"][0]["found"]
    assert "1 tensors differ, the first is body" in found


def test_a_shard_without_a_table_and_a_wrong_size_are_found(orchard: Project, forger: Forger) -> None:
    def change(manifest: Manifest) -> Manifest:
        rows = [replace(row, tensors=None) if row.tensors else replace(row, size_bytes=7) for row in manifest.files]
        return replace(manifest, files=tuple(rows))

    forger.accept(forger.replace_artifact("graft-main", change))
    assert {kind for kind, _ in kinds(orchard)} == {"table", "manifest"}


@pytest.mark.parametrize("case", ["dropped", "another"])
def test_recipe_files_that_are_not_the_keys_are_found(orchard: Project, forger: Forger, case: str) -> None:
    """The entry's file left out of the record; the blob of a recipe file replaced by that of another."""
    manifest = forger.manifest("graft-main")
    grow = next(row for row in manifest.build.recipe_files if row.path == "small/grow.py")
    if case == "another":
        soil = next(row for row in manifest.build.recipe_files if row.path == "small/soil.py")
        overwrite(orchard.blob(grow.digest), orchard.blob(soil.digest).read_bytes())
        assert ("blob", "graft@main: recipe file small/grow.py") in kinds(orchard)
        return

    def change(manifest: Manifest) -> Manifest:
        kept: tuple[RecipeFile, ...] = tuple(row for row in manifest.build.recipe_files if row != grow)
        return forger.with_build(manifest, replace(manifest.build, recipe_files=kept))

    forger.accept(forger.replace_artifact("graft-main", change))
    assert kinds(orchard) == {("recipe", "graft@main: recipe small.grow")}


@pytest.mark.parametrize(
    ("field", "where"),
    [
        ({"family": "root"}, "graft@main: tokenizer"),
        ({"digest": Digest.of(b"other ranks")}, "graft@main: tokenizer leaf: digest"),
        ({"padded_vocab": 256}, "graft@main: tokenizer leaf: padded_vocab"),
    ],
)
def test_another_tokenizer_is_found(orchard: Project, forger: Forger, field: dict[str, Any], where: str) -> None:
    def change(manifest: Manifest) -> Manifest:
        (pin,) = manifest.build.pins
        pin = pin._replace(digest=field.pop("digest", pin.digest), attributes={**pin.attributes, **field})
        return forger.with_build(manifest, replace(manifest.build, pins=(pin,)))

    forger.accept(forger.replace_artifact("graft-main", change))
    assert ("tokenizer", where) in kinds(orchard)


def test_a_tokenizer_whose_rank_file_is_another_is_found(orchard: Project, forger: Forger) -> None:
    """The declared digest stays; the artifact that should hold the rank file holds another."""
    before = forger.artifact("leaves-main")
    leaves = forger.replace_artifact("leaves-main", lambda m: forger.with_file(m, "leaf.tiktoken", b"b3RoZXI= 0\n"))
    graft = forger.relink("graft-main", before, leaves.digest)
    for manifest in (leaves, graft):
        forger.accept(manifest)
    assert kinds(orchard) == {("tokenizer", "graft@main: tokenizer leaf")}


def test_donor_bytes_that_are_not_the_pinned_ones_are_found(orchard: Project, forger: Forger) -> None:
    """The imported blob itself is held against the SHA-256, so re-registration does not help."""
    before = forger.artifact("seed-main")
    seed = forger.replace_artifact("seed-main", forger.with_tensor)
    forger.accept(seed)
    assert kinds(orchard, ref="seed") == {("source", "seed@main: model.safetensors")}
    forger.relink("plant-sprout", before, seed.digest)
    assert ("source", "seed@main: model.safetensors") in kinds(orchard, ref="plant@sprout")


def test_a_record_that_pins_other_sources_is_found(orchard: Project, forger: Forger) -> None:
    def change(manifest: Manifest) -> Manifest:
        sources = tuple(SourceRecord(row.role, "0" * 64, row.size_bytes) for row in manifest.build.sources)
        return forger.with_build(manifest, replace(manifest.build, sources=sources))

    forger.accept(forger.replace_artifact("leaves-main", change))
    assert kinds(orchard, ref="leaves") == {("source", "leaves@main: source ranks/leaf.tiktoken")}


@pytest.mark.parametrize("case", ["stripped", "smuggled", "only reports"])
def test_nothing_becomes_a_donor_by_losing_its_provenance(orchard: Project, forger: Forger, case: str) -> None:
    """An artifact without provenance.json must be what its sources pin, file by file."""

    def strip(manifest: Manifest) -> Manifest:
        return replace(manifest, files=tuple(row for row in manifest.files if row.path != "provenance.json"))

    def smuggle(manifest: Manifest) -> Manifest:
        extra = replace(manifest.files[0], path="extra.bin", digest=forger.store.blobs.put_bytes(b"more"), size_bytes=4)
        return replace(manifest, files=(*manifest.files, extra))

    slug, change = {
        "stripped": ("graft-main", strip),
        "smuggled": ("seed-main", smuggle),
        "only reports": ("reports-plant-bloom", strip),
    }[case]
    new = forger.replace_artifact(slug, change)
    forger.accept(new)
    assert {kind for kind, _ in kinds(orchard, ref=str(new.ref))} == {"source"}


def test_an_artifact_of_an_undeclared_stage_is_found(orchard: Project, forger: Forger) -> None:
    other = replace(forger.manifest("graft-main"), stage="other")
    forger.publish(other)
    assert ("declaration", "graft@other: configs/objects.toml") in kinds(orchard, ref=f"graft#{other.digest.hex[:16]}")


def test_a_forgery_without_any_witness_is_said_to_have_none(orchard: Project, forger: Forger) -> None:
    """What audit cannot prove: no lock, no signature, no trace of the true artifact."""
    (orchard.root / "vpstore.lock").unlink()
    forger.replace_artifact("graft-main", forger.with_tensor)
    document = orchard.json("audit", "graft")
    assert document["ok"]
    assert any("nothing outside the store vouches for it" in text for text in document["remarks"])
    shutil.rmtree(orchard.root / "weights")
    orchard.run("audit", "graft", code=11)
