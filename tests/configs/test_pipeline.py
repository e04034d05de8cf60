"""dvc.yaml covers at least what the build keys cover."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from recipes import run
from vpstore.checkout import Checkout
from vpstore.code import closure
from vpstore.pipeline import render
from vpstore.schema.ref import StageRef

ROOT = Path(__file__).resolve().parents[2]
PROFILES = ("tiny", "upcycle")


@pytest.fixture(scope="module")
def written() -> dict[str, dict[str, object]]:
    stages: dict[str, dict[str, object]] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    return stages


def test_dvc_yaml_is_what_the_generator_writes() -> None:
    checkouts = [Checkout.find(ROOT, profile=profile) for profile in PROFILES]
    assert (ROOT / "dvc.yaml").read_text() == render(checkouts), "run: vpstore pipeline --write"


@pytest.mark.parametrize("profile", PROFILES)
def test_every_stage_depends_on_its_whole_closure(written: dict[str, dict[str, object]], profile: str) -> None:
    checkout = Checkout.find(ROOT, profile=profile)
    for ref in checkout.objects.order:
        stage = written[ref.object if ref.object == "reports" else ref.slug]
        prepared = run.prepare(checkout, ref.object, ref.stage)
        code = closure(ROOT, prepared.recipe_entry, always=prepared.code_always, exclude=prepared.code_exclude)
        deps = set(stage["deps"])  # type: ignore[call-overload]
        assert {file.path for file in code} <= deps
        # DVC takes 4.0 and 4 for one param, so the files themselves are dependencies, too
        assert {*checkout.objects.stage(ref).config, "configs/profiles/${profile}.toml"} <= deps
        parents = checkout.objects.stage(StageRef(ref.object, ref.stage)).inputs.values()
        assert {f"weights/${{profile}}/refs/{parent.slug}.json" for parent in parents} <= deps


def test_outs_are_pointers_that_dvc_neither_caches_nor_deletes(written: dict[str, dict[str, object]]) -> None:
    for stage in written.values():
        for out in stage["outs"]:  # type: ignore[attr-defined]
            ((path, flags),) = out.items()
            assert flags["cache"] is False
            assert path.startswith("reports/") or flags["persist"] is True


def test_a_recipe_does_not_depend_on_what_only_moves_bytes(written: dict[str, dict[str, object]]) -> None:
    for stage in written.values():
        assert not [d for d in stage["deps"] if d.startswith(("vpstore/", "recipes/run.py"))]  # type: ignore[attr-defined]


def test_param_files_have_one_dot(written: dict[str, dict[str, object]]) -> None:
    """DVC chooses the parser by everything after the first dot of the name."""
    for stage in written.values():
        for entry in stage["params"]:  # type: ignore[attr-defined]
            assert all(Path(path.replace("${profile}", "p")).name.count(".") == 1 for path in entry)
