"""audit over a sound chain, and over one in which single things are wrong."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_server import APART
from damage_tools import flip, truncate
from forger import Forger, overwrite
from orchard import commit
from small_project import Project

from vpstore.evidence.contents import blobs_of, check_contents
from vpstore.evidence.declarations import check_families
from vpstore.evidence.dossier import Dossier
from vpstore.evidence.readings import Readings
from vpstore.schema.canonical import canonical_bytes
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import Manifest

CHAIN = ["seed", "plant", "plant", "leaves", "graft"]


def faults(project: Project, ref: str = "graft", *options: str) -> list[dict[str, Any]]:
    """All faults of an audit that must find some."""
    document = project.json("audit", ref, *options, code=3)
    assert not document["ok"]
    assert document["faults"]
    return list(document["faults"])


def wheres(found: list[dict[str, Any]]) -> list[str]:
    return [fault["where"] for fault in found]


def verdicts(document: Any) -> dict[str, str]:
    return {f"{row['object']}@{row['stage']}": row["verdict"] for row in document["chain"]}


def test_a_sound_chain_has_no_fault_and_every_link_a_verdict(orchard: Project) -> None:
    commit(orchard)
    document = orchard.json("audit", "graft")
    assert (document["ok"], document["faults"], document["remarks"]) == (True, [], [])
    assert verdicts(document) == dict.fromkeys(
        ["seed@main", "plant@sprout", "plant@bloom", "leaves@main", "graft@main"], "sound"
    )
    assert {row["lock"] for row in document["chain"]} == {"same"}
    assert [row["object"] for row in document["chain"]][-1] == "graft"
    assert document["blobs"] > 20
    for options in (["--locked"], ["--worktree"], ["--other-machine"]):
        assert orchard.json("audit", "graft", *options)["ok"]


def test_the_tree_shows_each_artifact_once_with_its_verdict(orchard: Project) -> None:
    lines = orchard.run("audit", "graft").stdout.splitlines()
    tree = lines[: lines.index("")]
    assert tree[0].startswith("graft@main  ")
    assert [sum(f"{name}@" in line for line in tree) for name in ("seed", "leaves", "plant", "graft")] == [1, 1, 2, 1]
    assert all("  sound" in line for line in tree)
    assert lines[-1].endswith("read again: no faults")


def test_a_digest_prefix_is_audited_without_a_pointer(orchard: Project) -> None:
    artifact = orchard.json("show", "graft")["artifact"]
    orchard.pointer("graft-main").unlink()
    assert orchard.json("audit", f"graft#{artifact[7:19]}")["ok"]
    assert orchard.json("audit", "graft")["ok"]  # by the lock
    orchard.run("audit", "graft#000000000000", code=11)
    orchard.run("audit", "nothing", code=11)


def test_an_audit_changes_nothing(orchard: Project) -> None:
    before = orchard.listing()
    orchard.run("audit", "graft")
    assert orchard.listing() == before


@pytest.mark.parametrize("part", ["shard", "table", "manifest", "recipe", "provenance", "intermediate", "donor"])
@pytest.mark.parametrize("damage", [flip, truncate])
def test_damage_of_any_blob_is_found_whatever_its_mode_and_times_say(
    orchard: Project, forger: Forger, part: str, damage: Any
) -> None:
    orchard.run("resolve", "graft")  # stamps everything
    manifest, seed = forger.manifest("plant-bloom"), forger.manifest("seed-main")
    shard = manifest.by_path["model.safetensors"]
    digest = {
        "shard": shard.digest,
        "table": shard.tensors,
        "manifest": manifest.digest,
        "recipe": manifest.build.recipe_files[-1].digest,
        "provenance": manifest.by_path["provenance.json"].digest,
        "intermediate": manifest.intermediates[0].digest,
        "donor": seed.by_path["model.safetensors"].digest,
    }[part]
    path = orchard.blob(str(digest))
    damage(*((path, path.stat().st_size - 1) if damage is flip else (path,)))
    found = faults(orchard)
    assert {fault["blob"] for fault in found} == {digest}
    if part == "shard":
        assert {fault["tensor"] for fault in found} == {"body"}


def test_a_blob_replaced_by_another_valid_blob_is_found(orchard: Project, forger: Forger) -> None:
    """The bytes are some artifact's, mode and mtime are the old ones, the size may be as well."""
    bloom, sprout = (
        forger.manifest(slug).by_path["model.safetensors"].digest for slug in ("plant-bloom", "plant-sprout")
    )
    assert orchard.blob(bloom).stat().st_size == orchard.blob(sprout).stat().st_size
    overwrite(orchard.blob(bloom), orchard.blob(sprout).read_bytes())
    found = faults(orchard)
    assert {(fault["blob"], fault["tensor"]) for fault in found} == {(bloom, "body")}
    assert found[0]["found"].startswith(sprout)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_blob_that_is_not_a_file_of_its_own_is_found(orchard: Project, forger: Forger, kind: str) -> None:
    path = orchard.blob(forger.manifest("plant-bloom").by_path["reports/metrics.json"].digest)
    aside = orchard.root / "aside"
    shutil.move(path, aside)
    {"link": lambda: path.symlink_to(aside), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()
    assert [fault["where"] for fault in faults(orchard)] == ["plant@bloom: reports/metrics.json"]


@pytest.mark.parametrize("part", ["recipe", "manifest", "shard"])
def test_what_is_missing_is_called_missing(orchard: Project, forger: Forger, part: str) -> None:
    manifest = forger.manifest("plant-sprout")
    digest = {
        "recipe": manifest.build.recipe_files[0].digest,
        "manifest": manifest.digest,
        "shard": manifest.by_path["model.safetensors"].digest,
    }[part]
    orchard.blob(digest).unlink()
    document = orchard.json("audit", "graft", code=3)
    assert {(fault["found"], fault["blob"]) for fault in document["faults"]} == {("missing", digest)}
    rows = {row["artifact"]: row["verdict"] for row in document["chain"]}
    assert rows[manifest.digest] == "missing"
    assert "missing" in orchard.run("audit", "graft", code=3).stdout


def test_a_key_file_that_is_missing_edited_or_forged_is_found(orchard: Project, forger: Forger) -> None:
    bloom, sprout = forger.manifest("plant-bloom"), forger.manifest("plant-sprout")
    path = forger.store.keys.folder(bloom.build.key()) / bloom.digest.hex
    data = path.read_bytes()
    path.unlink()
    assert wheres(faults(orchard)) == ["plant@bloom: key file"]
    path.write_bytes(data.replace(bloom.build.key().encode(), sprout.build.key().encode()))
    assert any("key file" in where for where in wheres(faults(orchard)))
    path.write_bytes(data)
    forger.store.keys.add(bloom.build.key(), sprout.digest)
    assert wheres(faults(orchard)) == [f"plant@bloom: key file {sprout.digest.short}"]


def test_a_second_artifact_under_a_key_is_told_and_no_fault(orchard: Project, forger: Forger) -> None:
    other = forger.publish(forger.with_tensor(forger.manifest("plant-bloom")))
    document = orchard.json("audit", "graft")
    assert document["ok"]
    assert [text for text in document["remarks"] if other.short in text and "does not reproduce" in text]


def attestation_of(forger: Forger, slug: str) -> Path:
    return next(forger.store.attestations.paths(forger.artifact(slug)))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("predicate", "buildDefinition", "resolvedDependencies", 0, "digest", "blake3"), "0" * 64),
        (("predicate", "buildDefinition", "externalParameters", "stage"), "sprout"),
        (("predicate", "buildDefinition", "externalParameters", "build_key"), "blake3:" + "1" * 64),
        (("subject", 0, "name"), "seed@main"),
        (("predicate", "runDetails", "byproducts"), []),
        (("predicate", "buildDefinition", "externalParameters", "object"), True),
    ],
)
def test_an_edited_attestation_is_found_also_under_its_new_name(
    orchard: Project, forger: Forger, place: tuple[Any, ...], value: Any
) -> None:
    path = attestation_of(forger, "plant-bloom")
    document = json.loads(path.read_text())
    inner = document
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    data = canonical_bytes(document)
    overwrite(path, data)
    assert any("does not match its name" in where for where in wheres(faults(orchard)))
    path.rename(path.with_name(f"{Digest.of(data).hex}.json"))
    found = faults(orchard)
    assert {fault["kind"] for fault in found} == {"attestation"}


def test_an_artifact_without_an_attestation_is_found(orchard: Project, forger: Forger) -> None:
    attestation_of(forger, "plant-bloom").unlink()
    assert wheres(faults(orchard)) == ["plant@bloom: attestations"]


def test_an_edited_pin_of_a_donor_is_found(orchard: Project) -> None:
    path = orchard.root / "configs" / "donor.json"
    document = json.loads(path.read_text())
    pinned = document["files"][1]["sha256"]
    document["files"][1]["sha256"] = "0" * 64
    path.write_text(json.dumps(document))
    found = faults(orchard)
    assert wheres(found) == ["seed@main: source donor/model.safetensors"]
    assert pinned in found[0]["found"]
    del document["files"][1]
    path.write_text(json.dumps(document))
    assert faults(orchard)[0]["expected"] == "no such source"
    path.write_text("{")
    assert faults(orchard)[0]["where"] == "seed@main: configs/donor.json"
    path.unlink()
    assert faults(orchard)[0]["where"] == "seed@main: configs/donor.json"


def test_staleness_is_a_verdict_and_a_fault_only_on_request(orchard: Project) -> None:
    orchard.environment[APART] = "1"
    recipe = orchard.root / "small" / "grow.py"
    recipe.write_text(recipe.read_text() + "edited = 'after the build'\n")
    config = orchard.root / "configs" / "plant.toml"
    config.write_text(config.read_text().replace("step = 3", "step = 4"))
    document = orchard.json("audit", "graft")
    assert document["ok"]
    assert verdicts(document) == {
        "seed@main": "sound", "leaves@main": "sound", "plant@sprout": "stale", "plant@bloom": "stale",
        "graft@main": "stale",
    }  # fmt: skip
    assert document["chain"][-1]["stale"] == ["code: small/grow.py", "params: step"]
    assert "stale  changed since: code: small/grow.py; params: step" in orchard.run("audit", "graft").stdout
    assert {fault["kind"] for fault in faults(orchard, "graft", "--worktree")} == {"stale"}


def test_a_parent_that_moved_on_makes_its_child_stale(orchard: Project) -> None:
    config = orchard.root / "configs" / "plant.toml"
    config.write_text(config.read_text().replace("step = 1", "step = 7"))
    orchard.run("build", "plant@sprout")
    document = orchard.json("audit", "graft")
    stale = {f"{row['object']}@{row['stage']}": row["stale"] for row in document["chain"] if row["stale"]}
    assert stale == {
        "plant@sprout": ["params: step"], "plant@bloom": ["input parent"], "graft@main": ["input data"],
    }  # fmt: skip


def test_what_was_rebuilt_with_other_params_is_not_the_locks(orchard: Project) -> None:
    config = orchard.root / "configs" / "plant.toml"
    config.write_text(config.read_text().replace("step = 3", "step = 4"))
    orchard.run("build", "graft")
    for options in ([], ["--other-machine"]):
        found = faults(orchard, "graft", *options)
        assert [(fault["kind"], fault["where"]) for fault in found] == [("lock", "graft@main: lock")]
        assert found[0]["found"].endswith("other params; the lock's artifact is in this store, too")
    orchard.run("lock", "graft")
    assert orchard.json("audit", "graft")["ok"]


def test_a_chain_built_on_another_machine_is_told_from_one_of_another_build(orchard: Project) -> None:
    """Noise in one stage stands for another machine's arithmetic: the same key, other bytes, and so other parents."""
    artifact = orchard.json("show", "plant@sprout")["artifact"]
    orchard.run("build", "plant@sprout", "--force", SMALL_NOISE="1")
    orchard.run("build", "plant@bloom", "graft")
    assert orchard.json("show", "plant@sprout")["artifact"] != artifact
    found = faults(orchard)
    assert [(fault["kind"], fault["where"]) for fault in found] == [("lock", "plant@sprout: lock")]
    document = orchard.json("audit", "graft", "--other-machine")
    assert {row["object"]: row["lock"] for row in document["chain"] if row["object"] != "plant"} == {
        "seed": "same", "leaves": "same", "graft": "inputs",
    }  # fmt: skip
    assert [row["lock"] for row in document["chain"] if row["object"] == "plant"] == ["bytes", "inputs"]
    assert verdicts(document)["graft@main"] == "differs"
    assert len(faults(orchard, "graft", "--locked")) == 3
    orchard.run("audit", "graft", "--locked", "--other-machine", code=2)


def test_what_the_lock_does_not_name_is_a_remark_unless_it_must(orchard: Project) -> None:
    (orchard.root / "vpstore.lock").unlink()
    document = orchard.json("audit", "graft")
    assert document["ok"]
    assert any("nothing outside the store vouches" in text for text in document["remarks"])
    assert len(faults(orchard, "graft", "--locked")) == 5


def test_a_damaged_lock_or_pointer_is_a_fault_and_the_audit_goes_on(orchard: Project, forger: Forger) -> None:
    lock = orchard.root / "vpstore.lock"
    text = lock.read_text()
    lock.write_text(text[:-4])
    document = orchard.json("audit", "graft", code=3)
    assert wheres(document["faults"]) == ["vpstore.lock"]
    assert len(document["chain"]) == 5
    lock.write_text(text)
    orchard.pointer("graft-main").write_text("{}")
    document = orchard.json("audit", "graft", code=3)
    assert wheres(document["faults"]) == ["graft@main: weights/tiny/refs/graft-main.json"]
    assert len(document["chain"]) == 5
    lock.unlink()
    assert orchard.json("audit", "graft", code=3)["chain"] == []


def test_tensor_names_cannot_paint_on_the_terminal(orchard: Project) -> None:
    from vpstore.cli.auditing import printable

    assert printable("a\x1b[2Jb\nc\u202e") == "a\\x1b[2Jb\\nc\\u202e"
    assert printable("‖A‖ ├─ ß") == "‖A‖ ├─ ß"


def test_a_manifest_that_changes_while_it_is_audited_is_found(orchard: Project, forger: Forger) -> None:
    """Digest and key are derived once more from the bytes on the disk, not from what was parsed at the beginning."""
    manifest, other = forger.manifest("graft-main"), forger.manifest("plant-bloom")
    readings = Readings(forger.store, lambda label, done, total: None)
    readings.read(blobs_of(manifest))

    def kinds(parsed: Manifest) -> list[str]:
        dossier = Dossier(manifest.digest, "graft@main", parsed)
        check_contents(dossier, parsed, readings)
        return sorted({fault.kind for fault in dossier.faults})

    assert kinds(manifest) == []
    assert "key" in kinds(replace(manifest, build=other.build))
    overwrite(orchard.blob(manifest.digest), other.encoded)
    assert "manifest" in kinds(manifest)


def test_a_sound_blob_is_read_once_however_many_artifacts_share_it(orchard: Project, forger: Forger) -> None:
    document = orchard.json("audit", "graft")
    digests = set[Digest]()
    for slug in ("seed-main", "plant-sprout", "plant-bloom", "leaves-main", "graft-main"):
        digests |= blobs_of(forger.manifest(slug))
    assert document["blobs"] == len(digests)
    assert document["read_bytes"] == sum(orchard.blob(digest).stat().st_size for digest in digests)


def test_one_family_of_tokenizers_is_one_tokenizer(forger: Forger) -> None:
    """Along the chain, whatever objects.toml says now."""
    first, last = forger.manifest("leaves-main"), forger.manifest("graft-main")
    (pin,) = last.build.pins
    other = replace(
        last, build=replace(last.build, pins=(pin._replace(attributes={**pin.attributes, "padded_vocab": 7}),))
    )
    dossiers = [Dossier(manifest.digest, str(manifest.ref), manifest) for manifest in (first, last, other)]
    check_families(dossiers)
    assert [len(dossier.faults) for dossier in dossiers] == [0, 0, 1]


def test_the_page_says_in_the_programs_words_what_another_build_is(orchard: Project) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "AUDIT.md").read_text(encoding="utf-8")
    (case,) = [line for line in page.splitlines() if line.startswith("* **another build than the lock's**")]
    pins = orchard.root / "configs" / "donor.json"
    size_bytes = (orchard.root / "assets" / "donor" / "model.safetensors").stat().st_size
    pins.write_text(pins.read_text().replace('"size_bytes": null', f'"size_bytes": {size_bytes}'))
    orchard.run("build", "seed")
    (fault,) = [fault for fault in faults(orchard, "seed") if fault["kind"] == "lock"]
    words = fault["found"].partition(": ")[2].partition(";")[0]
    assert words == "other inputs, sources or pins"
    assert words in case


LIES = {
    "prints and leaves": "import os; os.write(1, b'graft@main sound'); os._exit(0)",
    "mutes the audit": "from vpstore.evidence.dossier import Dossier; Dossier.fault = lambda *a, **k: None",
    "leaves": "raise SystemExit(0)",
    "of no kind": "raise type('Odd', (BaseException,), {})('odd')",
}


@pytest.mark.parametrize("lie", LIES)
def test_the_projects_own_code_cannot_talk_an_audit_into_anything(orchard: Project, forger: Forger, lie: str) -> None:
    orchard.environment[APART] = "1"
    forger.replace_artifact("plant-sprout", forger.with_tensor)
    before = orchard.json("audit", "plant@sprout", code=3)
    run = orchard.root / "small" / "run.py"
    run.write_text(f"{LIES[lie]}\n{run.read_text()}")
    after = orchard.json("audit", "plant@sprout", code=3)
    assert after["faults"] == before["faults"]
    is_silent = any("whether it is stale cannot be told" in remark for remark in after["remarks"])
    assert is_silent is (lie != "mutes the audit")
