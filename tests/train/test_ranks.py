"""Two ranks on loopback against one process: the same training to rounding, states that either takes up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import rank_main
import torch
from safetensors.torch import load_file
from training_pico import pico_moe, write_data

from recipes import runtime
from recipes.job import Job
from recipes.launch import on_ranks
from recipes.model.transformer import Student
from recipes.train.sharded import require_divides
from recipes.train.sharding import shared_names
from vpstore.errors import RecipeRefused

# Two orders of summation, which training drives apart until tokens are routed elsewhere: how far the losses of the
# first steps and of all may differ, in nats, and after 3 and 50 steps each weight, relative to its norm.
FIRST, FIRST_APART, ALL_APART = 20, 1e-5, 5e-3
WEIGHT_APART = {3: 1e-3, 50: 0.05}
KINDS = ("dense", "phases", "dense-phases")  # in the last, no weight that is shared out is trained at first
Runs = tuple[Path, int]  # folder, steps


def on_two_ranks(scratch: Path, cases: list[dict[str, Any]]) -> None:
    """As a build starts them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in runtime.environment(1).items():
            patch.setenv(name, value)  # which the ranks inherit
        patch.setattr(runtime, "_done_with", [1])
        on_ranks(rank_main.work, Job("recipes.heal", {"cases": cases}, 1, {}, {}, scratch), 2, lambda *_: None)


def rows_of(folder: Path, step: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / f"rows-{step}.json").read_text())
    return rows


@pytest.fixture(scope="module", params=[pytest.param(steps, marks=pytest.mark.slow) for steps in WEIGHT_APART])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every run that the tests look at: on two ranks in one launch, and in this process."""
    root, steps = tmp_path_factory.mktemp("ranks"), request.param
    write_data(root / "data")
    half = {"steps": steps, "until": steps - 1}

    def case(name: str, **options: Any) -> dict[str, Any]:
        return {"data": str(root / "data"), "folder": str(root / "two" / name), "steps": steps, **options}

    def in_one(name: str, **options: Any) -> None:
        rank_main.train(root / "data", root / "one" / name, **{"steps": steps, **options})

    def handed_over(name: str, source: str, target: str) -> None:
        shutil.copytree(root / source / name / "states", root / target / name / "states")

    in_one("taken-over", **half)
    handed_over("taken-over", "one", "two")
    cases = [case("experts"), case("handed-on", **half), case("taken-over")]
    if steps > 3:
        cases += [case(kind, kind=kind) for kind in KINDS]
        for kind in KINDS:
            in_one(kind, kind=kind)
    on_two_ranks(root, [*cases, case("handed-on")])
    in_one("experts")
    handed_over("handed-on", "two", "one")
    in_one("handed-on")
    return root, steps


def losses_apart(one: Path, other: Path, steps: int) -> list[float]:
    """How far each step's losses are from each other, in nats."""
    pairs = zip(rows_of(one, steps), rows_of(other, steps), strict=True)
    return [abs(ours["loss"] - theirs["loss"]) for ours, theirs in pairs]


def apart(one: Path, other: Path, steps: int) -> float:
    """The largest distance between two runs' weights, relative to the weights' norm."""
    found, expected = (load_file(path / f"weights-{steps}.safetensors") for path in (one, other))
    assert found.keys() == expected.keys()
    return max(
        float((found[name].double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-3))
        for name, wanted in expected.items()
    )


def require_alike(one: Path, other: Path, steps: int) -> None:
    assert [row["tokens"] for row in rows_of(one, steps)] == [row["tokens"] for row in rows_of(other, steps)]
    found = losses_apart(one, other, steps)
    assert max(found[:FIRST]) < FIRST_APART
    assert max(found) < ALL_APART
    assert apart(one, other, steps) < WEIGHT_APART[steps]
    assert rows_of(one, steps)[-1]["loss"] < rows_of(one, steps)[0]["loss"] - 0.01


def test_two_ranks_train_as_one_process_does_and_take_up_each_others_states(runs: Runs) -> None:
    root, steps = runs
    require_alike(root / "two" / "experts", root / "one" / "experts", steps)
    require_alike(root / "two" / "taken-over", root / "one" / "experts", steps)
    require_alike(root / "one" / "handed-on", root / "two" / "experts", steps)
    if steps > 3:
        for kind in KINDS:
            require_alike(root / "two" / kind, root / "one" / kind, steps)


def test_what_is_measured_before_the_first_step_is_the_same_and_who_trained_stands_in_the_record(runs: Runs) -> None:
    root, steps = runs
    one, two, taken = (
        json.loads((root / place / "record.json").read_text())
        for place in ("one/experts", "two/experts", "two/taken-over")
    )
    assert two["before"] == pytest.approx(one["before"], rel=1e-6)
    assert two["head"] == pytest.approx(one["head"], rel=1e-6)
    assert taken["before"] == one["before"]
    assert two["ranks"] == [{"from_step": 0, "ranks": 2}]
    assert taken["ranks"] == [{"from_step": 0, "ranks": 1}, {"from_step": steps - 1, "ranks": 2}]


def test_the_first_step_counts_and_routes_exactly_alike(runs: Runs) -> None:
    root, steps = runs
    one, two = (rows_of(root / world / "experts", steps)[0] for world in ("one", "two"))
    for key in one:
        exact = not isinstance(one[key], float) or key.startswith(("router_", "rate_"))
        assert two[key] == (one[key] if exact else pytest.approx(one[key], rel=1e-6)), key


def test_the_same_ranks_give_the_same_bits_after_a_stop(runs: Runs) -> None:
    root, steps = runs
    stopped, whole = root / "two" / "handed-on", root / "two" / "experts"
    assert apart(stopped, whole, steps) == 0
    assert rows_of(stopped, steps) == rows_of(whole, steps)


def test_a_state_of_two_ranks_is_two_files_without_pickle(runs: Runs) -> None:
    (state,) = (runs[0] / "two" / "experts" / "states").iterdir()
    assert len(list(state.glob("*.safetensors"))) == 2
    assert {path.suffix for path in state.iterdir()} == {".safetensors", ".json"}


def test_a_number_of_ranks_that_does_not_divide_the_experts_is_refused() -> None:
    with torch.device("meta"):
        model = Student(pico_moe())
    with pytest.raises(RecipeRefused, match="so many ranks") as refused:
        require_divides(model, shared_names(model), 3)
    assert "3 ranks" in refused.value.found
