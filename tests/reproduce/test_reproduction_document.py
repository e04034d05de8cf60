"""Reproductions as documents: what is written is read back, everything else is refused, and builds stay builds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpstore.errors import BadManifest, DigestMismatch
from vpstore.schema.attestation import BuildFacts, Statement
from vpstore.schema.canonical import canonical_bytes
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import BuildRecord, Manifest
from vpstore.schema.reproduction import MAX_NAMES, Outcome, Reproduction, Subject
from vpstore.storage.attestations import Attestations
from vpstore.surroundings import Stopwatch, machine

FACTS = BuildFacts(
    started_on="2026-01-01T00:00:00Z",
    finished_on="2026-01-01T00:00:02Z",
    finished_unix=1767225602,
    duration_seconds=2.5,
    environment={"torch": "2.11"},
    git={"commit": None, "dirty": None},
    builder_version={"vpstore": "0"},
    machine={"cpu": "A CPU", "cores": "2"},
)
MANIFEST = Manifest("plant", "bloom", BuildRecord("small.grow", (), {}), ())
SUBJECT = Subject("plant@bloom", MANIFEST.digest, MANIFEST.build.key())
OUTCOME = Outcome(
    result="FAILED",
    method="sample",
    tensors=2,
    tensors_total=9,
    proved_bytes=10,
    total_bytes=90,
    rebuilt=None,
    given_intermediates=("statistics",),
    seed=7,
    epsilon=0.5,
    tests={"passed": ("tensor a",), "failed": ("tensor b",)},
)


def example() -> Reproduction:
    return Reproduction.of(SUBJECT, OUTCOME, FACTS)


def test_a_reproduction_comes_back() -> None:
    again = Reproduction.decode(example().encode(), where="test")
    assert again == example()
    assert (again.subject, again.outcome, again.facts) == (SUBJECT, OUTCOME, FACTS)
    whole = replace(OUTCOME, method="whole", rebuilt=Digest.of(b"x"), seed=None, epsilon=None, given_intermediates=())
    assert Reproduction.of(SUBJECT, whole, FACTS).outcome == whole


def test_a_long_list_of_names_is_cut_and_the_counts_are_not() -> None:
    names = tuple(f"tensor {number}" for number in range(2 * MAX_NAMES))
    found = Reproduction.of(SUBJECT, replace(OUTCOME, tensors=len(names), tests={"failed": names}), FACTS)
    assert found.outcome.tests["failed"] == names[:MAX_NAMES]
    assert found.outcome.tensors == 2 * MAX_NAMES


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["_type"], "x"),
        (["predicateType"], "https://slsa.dev/provenance/v1"),
        (["subject"], []),
        (["subject", 0, "digest", "blake3"], "0" * 64),
        (["predicate", "result"], "MAYBE"),
        (["predicate", "configuration"], []),
        (["predicate", "configuration", 0, "name"], "key"),
        (["predicate", "passedTests"], [1]),
        (["predicate", "failedTests"], None),
        (["predicate", "reproduction"], {}),
        (["predicate", "reproduction", "method"], "guess"),
        (["predicate", "reproduction", "bytes", "proved"], -1),
        (["predicate", "reproduction", "epsilon"], "0.5"),
        (["predicate", "reproduction", "machine"], {"cpu": 1}),
        (["predicate", "reproduction", "durationSeconds"], True),
    ],
)
def test_a_document_that_is_not_one_is_refused(path: list[Any], value: Any) -> None:
    document = json.loads(example().encode())
    place = document
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(BadManifest):
        Reproduction.decode(canonical_bytes(document), where="test")


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(BadManifest):
        Reproduction.decode(data, where="test")


def test_builds_and_reproductions_lie_side_by_side_and_are_told_apart(tmp_path: Path) -> None:
    store = Attestations(tmp_path / "attestations", tmp_path)
    build = Statement.of(MANIFEST, FACTS)
    store.add(build)
    assert store.reproductions(MANIFEST.digest) == ()
    digest = store.add(example())
    assert store.of(MANIFEST.digest) == (build,)
    assert store.reproductions(MANIFEST.digest) == (example(),)
    kinds = {type(store.read(path)) for path in store.paths(MANIFEST.digest)}
    assert kinds == {Statement, Reproduction}
    path = store.folder(MANIFEST.digest) / f"{digest.hex}.json"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"FAILED", b"PASSED"))
    with pytest.raises(DigestMismatch):
        store.read(path)
    assert store.reproductions(MANIFEST.digest) == ()


def test_a_build_says_on_which_cpu_and_older_ones_still_read() -> None:
    statement = Statement.of(MANIFEST, FACTS)
    assert Statement.decode(statement.encode(), where="test").facts.machine == {"cpu": "A CPU", "cores": "2"}
    document = json.loads(statement.encode())
    del document["predicate"]["buildDefinition"]["internalParameters"]["machine"]
    old = Statement.decode(canonical_bytes(document), where="test")
    assert old.facts == replace(FACTS, machine={})
    assert Statement.of(MANIFEST, old.facts).encode() == canonical_bytes(document)


def test_the_machine_has_a_model_and_cores_and_no_name(tmp_path: Path) -> None:
    import platform

    found = machine()
    assert found["cpu"]
    assert int(found["cores"]) >= 1
    assert platform.node() not in found.values()
    assert Stopwatch().facts(tmp_path, {}).machine == found
