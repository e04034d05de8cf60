"""The disk fails at the n-th call: killed, cut off, refused or short; a sample here, every call in `make faults`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from disk_matrix import SCENARIOS, Bench, Sweep
from faulty_disk import LACKS
from negative_controls import CONTROLS
from write_order import faults_of_order

BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}
# So many places of each scenario, spread evenly over kinds and calls.
SAMPLE = 3


STARTED: dict[tuple[str, str], Sweep] = {}


def started(bench: Bench, name: str, control: str = "") -> Sweep:
    """A sweep that knows the undisturbed run; one serves all tests."""
    if (name, control) not in STARTED:
        STARTED[name, control] = Sweep(bench, BY_NAME[name], control)
        STARTED[name, control].start()
    return STARTED[name, control]


@pytest.mark.parametrize("name", BY_NAME)
def test_a_fault_at_a_sampled_call_loses_nothing(bench: Bench, name: str) -> None:
    sweep = started(bench, name)
    places = list(sweep.places(1))
    stride = len(places) // SAMPLE
    cases = [sweep.run(kind, at) for kind, at in places[stride // 2 :: stride | 1]]
    assert len(cases) >= SAMPLE - 1
    assert [case for case in cases if case.wrong] == []


@pytest.mark.parametrize("name", BY_NAME)
def test_a_file_system_that_lacks_a_call_loses_nothing(bench: Bench, name: str) -> None:
    sweep = started(bench, name)
    assert not sweep.run(LACKS[[*BY_NAME].index(name) % len(LACKS)], 1).wrong


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_no_call_that_a_file_system_lacks_loses_anything(bench: Bench, name: str) -> None:
    cases = [started(bench, name).run(kind, 1) for kind in LACKS]
    assert [case for case in cases if case.wrong] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", BY_NAME)
def test_a_fault_at_every_call_loses_nothing(bench: Bench, name: str) -> None:
    sweep = started(bench, name)
    cases = [sweep.run(kind, at) for kind, at in sweep.places(1)]
    assert len(cases) >= 6 * len(sweep.calls)
    assert [case for case in cases if case.wrong] == []


@pytest.mark.parametrize("control", CONTROLS)
def test_a_program_that_is_broken_on_purpose_is_found_out(bench: Bench, control: str) -> None:
    name, kind, part, accusation = CONTROLS[control]
    sweep = started(bench, name, control)
    places = [at for at, call in enumerate(sweep.calls, 1) if part in " ".join(call)]
    wrong = ""
    for at in places:
        if kind == "short write" and sweep.calls[at - 1][0] != "write":
            continue
        wrong = "; ".join(sweep.run(kind, at).wrong)
        if wrong:
            break
    assert re.search(accusation, wrong), f"not found: {wrong!r}"


def test_the_order_of_every_write(bench: Bench) -> None:
    """blob fsync < rename < directory fsync < manifest < attestation < key < root < pointer."""
    for name in ("first build, store included", "publish of two artifacts", "cache hit"):
        sweep = started(bench, name)
        assert faults_of_order(sweep.calls, _manifests(bench)) == []


@pytest.mark.parametrize("control", ["no_file_fsync", "no_directory_fsync", "pointer_before_manifest"])
def test_a_wrong_order_is_noticed(bench: Bench, control: str) -> None:
    sweep = started(bench, CONTROLS["pointer_before_manifest"][0], control)
    assert faults_of_order(sweep.calls, _manifests(bench)) != []


def _manifests(bench: Bench) -> set[str]:
    return {f"/blobs/blake3/{artifact[7:9]}/{artifact[9:]}" for artifact in bench.truth}


def test_every_call_that_changes_a_disk_goes_through_the_faulty_one() -> None:
    """The sweep reaches what `system.disk` is asked for; nothing else may write, rename or remove."""
    root = Path(__file__).resolve().parents[2] / "vpstore"
    direct = re.compile(
        r"\bos\.(write|fsync|replace|rename|link|symlink|unlink|remove|mkdir|makedirs|rmdir)\(|\.fsync\("
    )
    found = []
    for path in sorted(root.rglob("*.py")):
        if path.name in {"system.py", "supervised.py", "process.py", "worker.py"}:  # all but the first write into pipes
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if (match := direct.search(line)) and "system.disk" not in line:
                found.append(f"{path.relative_to(root)}:{number} {match[0]}")
    assert found == []
