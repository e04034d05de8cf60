"""Damage in every class of bytes, mode and mtime restored: found by whoever promises it, and never served."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from damage_scenarios import CLASSES, damages
from disk_matrix import Bench

NAMES = [wanted.name for wanted in CLASSES]


@pytest.fixture(scope="module")
def locked(bench: Bench) -> Bench:
    bench.call("lock_everything", bench.folder / "built")
    return bench


def swept(bench: Bench, name: str, count: int, control: str = "") -> dict[str, Any]:
    root = bench.folder / "damaged"
    shutil.copytree(bench.folder / "built", root, symlinks=True)
    done = bench.server.call("damage_scenarios:sweep", name, count, control, cwd=root, cache=bench.folder / "damage")
    shutil.rmtree(root)
    assert done["end"] == "done", done
    return dict(done["value"])


def check(found: dict[str, Any]) -> None:
    assert found["wrong"] == []
    for finder, number in found["found"].items():
        assert number == found["tried"] - found["harmless"], finder
    if found["found"]:  # nobody promises to find damage in stamps: they cost time only
        assert found["harmless"] <= 2  # a line end more or less at the end of a file that people may edit


@pytest.mark.parametrize("name", [wanted.name for wanted in CLASSES if wanted.finders])
def test_damage_is_found_and_never_served(locked: Bench, name: str) -> None:
    check(swept(locked, name, 3))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NAMES)
def test_damage_at_every_byte_is_found_and_never_served(locked: Bench, name: str) -> None:
    check(swept(locked, name, 4000))


@pytest.mark.parametrize(
    ("name", "control", "accusation"),
    [
        ("tensor data", "no_digest_check", "resolve serves wrong bytes"),
        ("tensor data", "nobody_reads", "not found"),
        ("attestation", "any_attestation", "not found"),
    ],
)
def test_a_program_that_looks_away_is_found_out(locked: Bench, name: str, control: str, accusation: str) -> None:
    assert any(accusation in text for text in swept(locked, name, 4, control)["wrong"])


def test_every_byte_is_damaged_if_there_are_few() -> None:
    data = bytes(range(50))
    changed = [after for _, after in damages(data, (0, 50), 100)]
    assert {
        index for after in changed if len(after) == 50 for index in range(50) if after[index] != data[index]
    } == set(range(50))
    assert {len(after) for after in changed} >= {0, 49, 51}
