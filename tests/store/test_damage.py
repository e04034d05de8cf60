"""Damage in every class of bytes, with mode and mtime put back: verify names it, resolve refuses it, build mends it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from damage_tools import file_of, flip, shown, tensor_begin, truncate
from small_project import Project

BLOBS: dict[str, Callable[[Any], str]] = {
    "manifest": lambda document: document["artifact"],
    "tensor table": lambda document: file_of(document, "model.safetensors")["tensors"],
    "model.safetensors": lambda document: file_of(document, "model.safetensors")["digest"],
    "provenance.json": lambda document: file_of(document, "provenance.json")["digest"],
    "reports/metrics.json": lambda document: file_of(document, "reports/metrics.json")["digest"],
    "intermediate statistics": lambda document: document["manifest"]["intermediates"][0]["digest"],
    "recipe file small/grow.py": lambda document: document["manifest"]["build"]["recipe"]["files"][1]["digest"],
}


@pytest.mark.parametrize("what", sorted(BLOBS))
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_blob_is_found_refused_and_mended(built: Project, what: str, damage: str) -> None:
    path = built.blob(BLOBS[what](shown(built)))
    healthy = path.read_bytes()
    if damage == "flip":
        flip(path, len(healthy) // 2)
    elif damage == "truncate":
        truncate(path)
    else:
        path.unlink()
    faults = built.json("verify", "plant", code=3)["faults"]
    assert {fault["blob"] for fault in faults} == {f"blake3:{path.parent.name}{path.name}"}
    assert all(what in fault["where"] for fault in faults)
    refused = built.run("resolve", "plant", code=12 if damage == "remove" else 13)
    assert refused.stdout == ""
    assert path.exists() == (damage != "remove")  # reading repaired and deleted nothing
    assert not built.json("build", "plant")["builds"][0]["cached"]
    assert path.read_bytes() == healthy
    built.run("verify", "--all")


@pytest.mark.parametrize("name", ["body", "kept"])
def test_the_damaged_tensor_is_named(built: Project, name: str) -> None:
    path = built.blob(file_of(shown(built), "model.safetensors")["digest"])
    flip(path, tensor_begin(built, name) + 3)
    faults = built.json("verify", "plant", code=3)["faults"]
    assert [(fault["where"], fault["tensor"]) for fault in faults] == [("plant@bloom: model.safetensors", name)]
    assert f"tensor {name}" in built.run("verify", "plant", code=3).stdout


def test_a_damaged_header_is_named(built: Project) -> None:
    path = built.blob(file_of(shown(built), "model.safetensors")["digest"])
    flip(path, 12)
    assert [fault["tensor"] for fault in built.json("verify", "plant", code=3)["faults"]] == ["(header)"]


def test_verify_all_reads_what_no_ref_leads_to(built: Project) -> None:
    config = built.root / "configs" / "plant.toml"
    orphan = built.blob(built.json("resolve", "plant")["artifact"])
    config.write_text(config.read_text().replace("step = 2", "step = 3"))
    built.run("build", "--all")
    flip(orphan, 30)
    built.run("verify")
    faults = built.json("verify", "--all", code=3)["faults"]
    assert [fault["blob"] for fault in faults] == [f"blake3:{orphan.parent.name}{orphan.name}"]


def test_damaged_keys_and_attestations_are_found_and_cost_a_cache_hit(built: Project) -> None:
    document = shown(built)
    key = document["key"].removeprefix("blake3:")
    flip(next((built.store / "keys" / key[:2] / key).iterdir()), 15)
    assert any("key" in fault["where"] for fault in built.json("verify", "plant", code=3)["faults"])
    assert not built.json("build", "plant")["builds"][0]["cached"]
    built.run("verify", "plant")
    folder = built.store / "attestations" / document["artifact"].removeprefix("blake3:")
    for path in folder.iterdir():
        flip(path, 100)
    assert any("attestation" in fault["where"] for fault in built.json("verify", "plant", code=3)["faults"])
    assert not built.json("build", "plant")["builds"][0]["cached"]
