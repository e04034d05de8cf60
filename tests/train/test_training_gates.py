"""Each gate missed by a model or data damaged for it, and gates that say that they could not be measured."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_pico import (
    ANALYSIS,
    ASSISTANT,
    FINAL,
    Workshop,
    one_tokenizer,
    params_table,
    pico_config,
    pico_moe,
    pico_weights,
    write_checkpoint,
    write_data,
)

from recipes import heal, wake_up
from recipes.params.heal import Params
from recipes.params.training import GateParams
from recipes.params.wake_up import Params as WakeUpParams
from recipes.recipe import RunResult, refuse_missed
from recipes.train.conversation_validity import CALL, CHANNEL, END, MESSAGE, RETURN, START, is_valid_answer
from recipes.train.gates import judge, training_gates
from vpstore.errors import GateMissed, RecipeRefused


def params(*, gates: dict[str, Any] | None = None, **train: Any) -> Params:
    table = params_table(**{"steps": 3, **train})
    for section, values in (gates or {}).items():
        table["gates"][section] = {**table["gates"][section], **values} if isinstance(values, dict) else values
    return Params.model_validate_json(json.dumps(table))


@pytest.fixture(scope="module", autouse=True)
def _one_tokenizer() -> Iterator[None]:
    with one_tokenizer():
        yield


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop.make(tmp_path_factory.mktemp("shop"), pico_moe())


@pytest.fixture
def damaged(shop: Workshop, tmp_path: Path) -> Workshop:
    """The same inputs in a folder of their own, for a test to spoil."""
    for folder in ("parent", "data", "tokenizer"):
        (tmp_path / folder).symlink_to(shop.root / folder)
    return Workshop(tmp_path)


def replace_parent(workshop: Workshop, weights: dict[str, torch.Tensor]) -> None:
    (workshop.root / "parent").unlink()
    write_checkpoint(workshop.root / "parent", pico_moe(), weights)


def missed(workshop: Workshop, some: Params) -> str:
    """Which gates a run misses; the state must have been kept."""
    with pytest.raises(GateMissed) as refusal:
        heal.run(workshop.context(some))
    assert refusal.value.exit_code == 20
    assert list((workshop.root / "scratch" / "training").glob("state-*"))
    return refusal.value.found


def test_a_healthy_run_passes_and_reports(shop: Workshop) -> None:
    result = heal.run(shop.context(params(), scratch="healthy"))
    verdicts = {gate.name: gate.verdict for gate in result.report.gates}
    assert verdicts.pop("numeric_accuracy") == verdicts.pop("numeric_nats_per_token") == "not measurable"
    assert set(verdicts.values()) == {"passed"}
    assert {"steps_not_finite", "loss_spikes", "weights_finite", "held_out_improvement"} <= verdicts.keys()
    assert {"harmony_control_token_accuracy", "router_max_dead_percent", "router_max_load_percent"} <= verdicts.keys()
    reasons = {gate.name: gate.reason for gate in result.report.gates if gate.value is None}
    assert "the parent answers 0 of the prompts" in reasons["numeric_accuracy"]
    before, after = result.report.metrics["before"], result.report.metrics["after"]
    assert after["held_out"]["bits_per_token"] < before["held_out"]["bits_per_token"]
    assert after["held_out"]["bits_per_token"] == pytest.approx(after["held_out"]["nats_per_token"] / math.log(2))
    assert len(result.report.plots["training"]) == 3
    assert [row["layer"] for row in result.report.plots["router"]] == [2, 3, 4]
    json.dumps([dict(result.report.metrics), dict(result.report.plots)], allow_nan=False)
    dtypes = {name: tensor.dtype for name, tensor in result.tensors.items()}
    assert dtypes["lm_head.weight"] == torch.bfloat16
    assert dtypes["model.grape.log_freq"] == dtypes["model.layers.1.mlp.router.expert_bias"] == torch.float32
    names = {file.name for file in result.files}
    assert names == {"config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens.json"}


def test_a_parent_with_a_nan_is_refused_before_the_first_step(damaged: Workshop) -> None:
    weights = pico_weights(pico_moe())
    weights["model.norm.weight"][3] = math.nan
    replace_parent(damaged, weights)
    with pytest.raises(RecipeRefused, match="not finite"):
        heal.run(damaged.context(params()))
    assert not (damaged.root / "scratch" / "training").exists()


def test_weights_that_overflow_miss(damaged: Workshop) -> None:
    weights = pico_weights(pico_moe())
    weights["model.norm.weight"][3] = 3e38  # finite; its products are not
    replace_parent(damaged, weights)
    found = missed(damaged, params())
    assert "steps_not_finite = 1" in found
    assert "held_out_improvement = nan" in found


@pytest.mark.parametrize(("is_finite", "verdict"), [(True, "passed"), (False, "missed")])
def test_a_result_that_is_not_finite_misses(is_finite: bool, verdict: str) -> None:
    figures: dict[str, Any] = {
        "is_finite": is_finite,
        "held_out": {"nats_per_token": 1.0},
        "numeric": {"accuracy": 1.0, "nats_per_token": 1.0, "copy_gain": 1.0},
        "harmony": {},
        "router": [],
    }
    verdicts = {gate.name: gate.verdict for gate in judge(figures, figures, params().gates)}
    assert verdicts["weights_finite"] == verdict


def test_a_collapsed_router_misses(damaged: Workshop) -> None:
    weights = pico_weights(pico_moe())
    for name, tensor in weights.items():
        if name.endswith("router.weight"):
            tensor.copy_(tensor[:1].expand_as(tensor))  # all rows equal
        if name.endswith("router.expert_bias"):
            tensor[5] = 100.0
    replace_parent(damaged, weights)
    found = missed(damaged, params(gates={"router": {"max_dead": 0.25, "max_load": 0.45}}))
    assert "router_max_dead_percent = 75" in found  # two experts of eight take everything
    assert "router_max_load_percent = 50" in found


@pytest.mark.slow
def test_spiky_data_misses(damaged: Workshop) -> None:
    """Documents of one id that is easy, then of ids that never came before."""

    def document(number: int, generator: np.random.Generator) -> tuple[list[int], list[int]]:
        ids = [17] * 200 if number % 6 else [int(x) for x in generator.integers(50_000, 190_000, 400)]
        return [*ids, 199999], [0] * (len(ids) + 1)

    (damaged.root / "data").unlink()
    write_data(damaged.root / "data", make=document)
    changes = {"steps": 24, "sequence_length": 100, "spikes": {"window": 2, "factor": 1.3}, "sequences": 1}
    assert "loss_spikes" in missed(damaged, params(gates={"held_out": {"improvement": -100.0}}, **changes))


@pytest.mark.slow
def test_no_improvement_misses(damaged: Workshop) -> None:
    found = missed(damaged, params(gates={"held_out": {"improvement": 50.0}}))
    assert "held_out_improvement" in found


@pytest.mark.slow
def test_harmony_below_its_threshold_misses(damaged: Workshop) -> None:
    assert "harmony_control_token_accuracy" in missed(damaged, params(gates={"harmony": {"threshold": 1.0}}))


@pytest.mark.slow
def test_sampled_answers_of_an_untrained_model_are_not_valid(damaged: Workshop) -> None:
    sampled = {"mode": "sampled", "threshold": 0.5, "rows": 2, "max_new_tokens": 3}
    assert "harmony_valid_answers = 0" in missed(damaged, params(gates={"harmony": sampled}))


@pytest.mark.slow
def test_harmony_without_held_out_conversations_is_not_measurable(damaged: Workshop) -> None:
    def only_prose(number: int, generator: np.random.Generator) -> tuple[list[int], list[int]]:
        ids = [*(16 + np.cumsum(generator.integers(1, 3, 40)) % 40).tolist(), 199999]
        return ids, [0] * len(ids)

    (damaged.root / "data").unlink()
    write_data(damaged.root / "data", make=only_prose)
    gates = {gate.name: gate for gate in heal.run(damaged.context(params())).report.gates}
    assert gates["harmony_control_token_accuracy"].verdict == "not measurable"
    assert gates["harmony_control_token_accuracy"].reason


def figures(**changes: Any) -> dict[str, Any]:
    numeric = {"accuracy": 0.8, "token_accuracy": 0.9, "nats_per_token": 1.0, "copy_gain": 2.0}
    return {
        "held_out": {"nats_per_token": 3.0, "bits_per_token": 4.3, "tokens": 10.0},
        "numeric": {**numeric, **changes},
        "harmony": {"control_token_accuracy": 0.9},
        "router": [],
        "is_finite": True,
    }


def verdicts(before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
    table = params_table()["gates"]
    table["held_out"]["improvement"] = 0.0
    settings = GateParams.model_validate_json(json.dumps(table))
    return {gate.name: gate.verdict for gate in judge(before, after, settings)}


def test_numbers_are_held_against_a_parent_that_knows_them() -> None:
    assert set(verdicts(figures(), figures()).values()) == {"passed"}
    assert verdicts(figures(), figures(accuracy=0.71))["numeric_accuracy"] == "passed"
    assert verdicts(figures(), figures(accuracy=0.69))["numeric_accuracy"] == "missed"
    assert verdicts(figures(), figures(nats_per_token=1.51))["numeric_nats_per_token"] == "missed"
    assert verdicts(figures(), figures(nats_per_token=None))["numeric_nats_per_token"] == "missed"


def test_numbers_at_chance_in_the_parent_are_not_measurable_however_good_the_result() -> None:
    found = verdicts(figures(accuracy=0.05, copy_gain=0.01), figures(accuracy=1.0))
    assert found["numeric_accuracy"] == found["numeric_nats_per_token"] == "not measurable"


def test_the_run_itself_is_judged() -> None:
    rows = [{"is_spike": False}, {"is_spike": True}]
    assert [gate.verdict for gate in training_gates(rows, stopped=None, max_spikes=1)] == ["passed", "passed"]
    gates = training_gates(rows, stopped={"step": 3}, max_spikes=0)
    assert [gate.verdict for gate in gates] == ["missed", "missed"]
    with pytest.raises(GateMissed, match="2 of 2 gates missed"):
        refuse_missed(gates, where="here")


THOUGHT = [START, ASSISTANT, CHANNEL, ANALYSIS, MESSAGE, 17, END]
ANSWER = [START, ASSISTANT, CHANNEL, FINAL, MESSAGE, 18, RETURN]


def decode(ids: Any) -> str:
    words = {ASSISTANT: "assistant", ANALYSIS: "analysis", FINAL: "final", 220: " ", 17: "2", 18: "3", 1428: "user"}
    return "".join(words[one] for one in ids)


@pytest.mark.parametrize(
    ("ids", "is_valid"),
    [
        ([*THOUGHT, *ANSWER], True),
        ([*THOUGHT, *THOUGHT, *ANSWER], True),
        (ANSWER, False),  # no analysis
        (THOUGHT, False),  # no final
        ([*ANSWER, *THOUGHT], False),
        ([*THOUGHT, *ANSWER[:-1]], False),  # not closed
        ([*THOUGHT, *ANSWER[:-1], END], False),
        ([*THOUGHT[:-1], RETURN, *ANSWER], False),
        ([*THOUGHT, *ANSWER[:5], 220, RETURN], False),  # empty final
        ([*THOUGHT, *ANSWER[:5], CALL, RETURN], False),  # unknown control token
        ([*THOUGHT[:6], CHANNEL, END, *ANSWER], False),  # nested
        ([*THOUGHT, *ANSWER[:5], 200500, RETURN], False),  # an id that has no meaning
        ([*THOUGHT, START, 1428, CHANNEL, FINAL, MESSAGE, 18, RETURN], False),  # another role
        ([17, *THOUGHT, *ANSWER], False),
        ([START, ASSISTANT, ANALYSIS, MESSAGE, 17, END, *ANSWER], False),  # no channel
        ([], False),
    ],
)
def test_the_parser_accepts_the_format_and_nothing_else(ids: list[int], is_valid: bool) -> None:
    assert is_valid_answer(ids, decode) is is_valid


def wake_params(**changes: Any) -> WakeUpParams:
    table = params_table(steps=4)
    table["gates"]["held_out"]["improvement"] = -1.0
    table |= {"new_layers_steps": 2, "second_warmup_steps": 1, **changes}
    return WakeUpParams.model_validate_json(json.dumps(table))


def woken(workshop: Workshop, some: WakeUpParams) -> RunResult:
    return wake_up.run(workshop.context(some, scratch=f"wake{some.new_layers_steps}{len(some.new_layers)}"))


@pytest.mark.slow
def test_wake_up_trains_the_layers_that_the_parent_names_first(tmp_path: Path) -> None:
    config = pico_config(num_layers=4)
    workshop = Workshop.make(tmp_path, config)
    parent = workshop.root / "parent"
    with pytest.raises(RecipeRefused, match="which layers are new"):
        woken(workshop, wake_params())
    (parent / "expansion.json").write_text(json.dumps({"map": [1, 4], "inserted": [2, 3]}))
    result = woken(workshop, wake_params())
    rows = result.report.plots["training"]
    assert [row["phase"] for row in rows] == ["new_layers", "new_layers", "all", "all"]
    old = pico_weights(config)
    only_new = woken(workshop, wake_params(new_layers_steps=4, second_warmup_steps=0, new_layers=[3]))
    moved = {name for name, tensor in only_new.tensors.items() if not torch.equal(tensor, old[name])}
    assert moved
    assert all(name.startswith("model.layers.2.") for name in moved)
    shutil.rmtree(parent)
