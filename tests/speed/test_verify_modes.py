"""verify --full reads every byte on all cores; --quick believes stat stamps, and only for the bytes of blobs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from damage_tools import file_of, flip, shown
from small_project import Project

from vpstore.storage.stamps import Stamps, Stat


def shard_of(project: Project) -> Path:
    return project.blob(file_of(shown(project), "model.safetensors")["digest"])


def faults(project: Project, *options: str) -> list[dict[str, Any]]:
    document = project.json("verify", *options, code=3)
    assert document["ok"] is False
    return list(document["faults"])


def settle(path: Path) -> None:
    while not Stat.of(path).is_settled(time.time_ns()):
        time.sleep(0.01)


def forge_stamp(project: Project, path: Path, digest: str) -> None:
    """What a stamp would be if ctime could be set back: the damaged file's own stat with the digest it should have."""
    settle(path)
    Stamps(project.cache / "vpstore").record([(Stat.of(path), digest)])


def test_both_find_damage_with_mode_and_time_put_back(built: Project) -> None:
    path = shard_of(built)
    built.run("verify")
    flip(path, path.stat().st_size - 1)
    expected = faults(built)
    assert {row["tensor"] for row in expected} == {"body"}
    assert faults(built, "--quick") == expected
    assert faults(built, "--full") == expected


def test_only_full_looks_behind_a_stamp(built: Project) -> None:
    path = shard_of(built)
    digest = file_of(shown(built), "model.safetensors")["digest"]
    flip(path, path.stat().st_size - 1)
    forge_stamp(built, path, digest)
    built.run("verify", "--quick")
    assert faults(built)
    assert faults(built, "--all")


@pytest.mark.parametrize("what", ["manifest", "table", "provenance"])
def test_quick_reads_documents_whatever_their_stamps_say(built: Project, what: str) -> None:
    document = shown(built)
    shard = file_of(document, "model.safetensors")
    digest = {
        "manifest": document["artifact"],
        "table": shard["tensors"],
        "provenance": file_of(document, "provenance.json")["digest"],
    }[what]
    path = built.blob(digest)
    flip(path, path.stat().st_size // 2)
    forge_stamp(built, path, digest)
    assert any(row["blob"] == digest for row in faults(built, "--quick"))


def test_a_missing_blob_and_a_folder_in_its_place_are_faults_of_their_own(built: Project) -> None:
    path = shard_of(built)
    path.unlink()
    assert {row["found"] for row in faults(built)} == {"missing"}
    path.mkdir()
    assert {row["found"] for row in faults(built)} == {"no plain file"}


def test_reading_a_sound_blob_stamps_it_and_reading_a_bad_one_does_not(built: Project) -> None:
    path = shard_of(built)
    digest = file_of(shown(built), "model.safetensors")["digest"]
    settle(path)
    built.run("verify")
    assert Stamps(built.cache / "vpstore").holds(path, digest)
    flip(path, path.stat().st_size - 1)
    forge_stamp(built, path, digest)
    faults(built)
    assert not Stamps(built.cache / "vpstore").holds(path, digest)
