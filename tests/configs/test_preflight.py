"""What `vpstore doctor --profile NAME` says before a real run, on the repository's own profiles."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from recipes import gpus, preflight
from recipes.gpus import Card
from recipes.preflight import Finding
from recipes.run import prepare
from vpstore.checkout import Checkout
from vpstore.verbs import doctor

ROOT = Path(__file__).resolve().parents[2]


def said(profile: str) -> dict[str, Finding]:
    checkout = Checkout.find(ROOT, profile=profile)
    refs = checkout.objects.order
    stages = {str(ref): prepare(checkout, ref.object, ref.stage) for ref in refs}
    parents = {str(ref): list(map(str, checkout.objects.stage(ref).inputs.values())) for ref in refs}
    return {finding.name: finding for finding in preflight.findings(stages, parents, ROOT)}


def test_the_embedded_profile_asks_for_nothing_that_is_not_here() -> None:
    found = said("tiny")
    assert [name for name, finding in found.items() if not finding.ok] == []
    assert "has not been timed" in found["time of vpMoE@smoke"].detail


def test_the_real_profile_names_its_donors_and_the_hours_of_its_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VPSTORE_DEVICE", raising=False)
    found = said("upcycle")
    assert not found["sources"].ok
    assert "vpstore import" in found["sources"].next_step
    assert not found["card"].ok
    hours = [f.detail for name, f in found.items() if name.startswith("time of")]
    assert len(hours) == 4
    assert all(" hours on one H200" in detail for detail in hours)


@pytest.mark.parametrize(("memory_gib", "fits"), [(80, False), (141, True)])
def test_a_card_is_held_against_the_largest_step(monkeypatch: pytest.MonkeyPatch, memory_gib: int, fits: bool) -> None:
    monkeypatch.setenv("VPSTORE_DEVICE", "cuda")
    monkeypatch.setattr(gpus, "cards", lambda: [Card("a card", memory_gib << 30)])
    card = said("upcycle")["card"]
    assert card.ok is fits
    assert "vpMoE@smoke" in card.detail
    assert "recompute" in card.next_step


@pytest.mark.parametrize(("free_gb", "ok"), [(10, False), (1000, True)])
def test_the_disk_is_held_against_all_checkpoints_and_two_states(
    monkeypatch: pytest.MonkeyPatch, free_gb: int, ok: bool
) -> None:
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=free_gb * 10**9))
    assert said("upcycle")["disk"].ok is ok


@pytest.mark.skipif(not (ROOT / ".vpstore").is_dir(), reason="needs the store that make repro fills")
def test_doctor_asks_where_a_profile_is_named_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Finding("sources", False, "two are missing", "put them there")
    monkeypatch.setattr("recipes.run.findings", lambda *_: [missing])
    named, unnamed = (doctor.examine(ROOT, profile=profile) for profile in ("tiny", None))
    said = [check for check in named.checks if check.name == "sources"]
    assert [(check.ok, check.next_step) for check in said] == [(False, "put them there")]
    assert "preflight" not in {check.name for check in unnamed.checks}
