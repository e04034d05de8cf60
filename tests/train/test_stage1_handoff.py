"""The Stage 1 files say all that the contract lists, read back, and refuse what cannot run."""

from __future__ import annotations

import json
import tomllib
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_pico import (
    Workshop,
    checkpoint_context,
    params_table,
    pico_config,
    pico_moe,
    pico_weights,
    write_checkpoint,
)

from recipes import stage1_handoff
from recipes.params.stage1_handoff import Params
from recipes.recipe import Plan
from recipes.train.run_files import parse_arguments, to_toml, write_arguments
from vpstore.errors import RecipeRefused


def params(**changes: Any) -> Params:
    table = {
        "batch": {
            "sequence_length": 2048,
            "global_sequences": 256,
            "micro_sequences": 4,
            "target_tokens": 1_000_000_000,
            "precision": "bf16",
        },
        "loss_weights": {"reasoning": 1.0, "final": 1.0},
        "schedule": {"warmup_steps": 100, "shape": "cosine", "final": 0.1},
        "optimizer": params_table()["train"]["optimizer"],
        "seeds": {"model": 1, "data_order": 2},
        "periods": {"save": 250, "evaluate": 100, "router_log": 50},
        "stop": {
            "min_format_validity": 0.95,
            "format_window": 3,
            "flat_improvement": 0.002,
            "flat_window": 5,
            "max_dead": 0.1,
            "max_load": 0.04,
            "alarm_after_steps": 200,
        },
        "packing": "document_bounded",
        "teacher": "openai/gpt-oss-120b",
        "later_stages": [
            {"name": "stage2", "tokens": 2_000_000_000, "objective": "teacher-confidence weighted CE"},
            {"name": "stage3", "tokens": 8_000_000_000, "objective": "on-policy distillation"},
        ],
        **changes,
    }
    return Params.model_validate_json(json.dumps(table))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop.make(tmp_path_factory.mktemp("shop"), pico_moe())


def texts(plan: Plan) -> dict[str, str]:
    found = {}
    for file in plan.files:
        out = BytesIO()
        file.write(out)
        found[file.name] = out.getvalue().decode()
    return found


def test_the_run_is_complete(shop: Workshop) -> None:
    plan = stage1_handoff.plan(checkpoint_context(shop, params()))
    assert not plan.tensors
    files = texts(plan)
    run = tomllib.loads(files["stage1.toml"])
    assert {role: one["digest"] for role, one in run["inputs"].items()} == {
        role: f"blake3:{role}" for role in ("checkpoint", "data", "tokenizer")
    }
    assert run["object"] == "vpMoE"
    assert run["batch"]["steps"] == -(-1_000_000_000 // (2048 * 256)) == 1908
    assert run["loss"]["weights"] == {"reasoning": 1.0, "final": 1.0}
    assert run["loss"]["mask_ids_from"] == 200019
    assert run["teacher"]["model"] == "openai/gpt-oss-120b"
    assert [stage["name"] for stage in run["later_stages"]] == ["stage2", "stage3"]
    assert run["router"]["num_experts"] == 8
    assert run["schedule"]["restart"] is True
    assert run["data"]["packing"] == "document_bounded"
    assert {"normuon_second_moment", "expert_bias", "log_freq_float32", "consumed_samples"} <= set(
        run["resume"]["state"]
    )
    assert {"checkpoint", "data", "tokenizer", "config"} == set(run["identity"]["refuse_if_different"])
    logs = run["logging"]
    assert {"cross_entropy_reasoning", "gradient_norm", "tokens_per_second"} <= set(logs["every_step"])
    assert {"entropy", "cv_percent", "dead_experts"} <= set(logs["router"])
    assert run["stop"]["min_format_validity"] == 0.95
    arguments = parse_arguments(files["megatron_args.txt"])
    assert arguments["num-experts"] == "8"
    assert arguments["moe-layer-freq"] == "[0]+[1]*3"
    assert arguments["window-size"] == "127,0"  # T13: two numbers
    assert arguments["norm-epsilon"] == "1e-06"
    assert arguments["train-iters"] == "1908"
    assert arguments["moe-router-dtype"] == "fp32"
    assert "moe-router-enable-expert-bias" in arguments
    for role in ("checkpoint", "data", "tokenizer"):
        assert f"blake3:{role}" in files["megatron_args.txt"]
    assert texts(stage1_handoff.plan(checkpoint_context(shop, params()))) == files


def test_what_cannot_run_is_refused(shop: Workshop, tmp_path: Path) -> None:
    batch = params().batch.model_dump()
    with pytest.raises(RecipeRefused, match="longer than the model"):
        stage1_handoff.plan(checkpoint_context(shop, params(batch={**batch, "sequence_length": 4096})))
    with pytest.raises(RecipeRefused, match="warm-up"):
        stage1_handoff.plan(checkpoint_context(shop, params(batch={**batch, "target_tokens": 1000})))
    write_checkpoint(tmp_path / "parent", pico_config(), pico_weights(pico_config()))
    with pytest.raises(RecipeRefused, match="mixture"):
        stage1_handoff.plan(checkpoint_context(Workshop(tmp_path), params()))


def test_files_that_do_not_say_the_run_are_refused(shop: Workshop) -> None:
    context = checkpoint_context(shop, params())
    moe = pico_moe().moe
    assert moe is not None
    run = stage1_handoff.run_config(context, pico_moe(), moe)
    toml = to_toml(run)
    arguments = write_arguments(stage1_handoff.megatron_arguments(run))
    stage1_handoff.validate(toml, arguments, run)
    with pytest.raises(RecipeRefused, match="read back") as refusal:
        stage1_handoff.validate(toml.replace("restart = true", "restart = false"), arguments, run)
    assert refusal.value.where == "stage1.toml: schedule"
    with pytest.raises(RecipeRefused, match="read back") as refusal:
        stage1_handoff.validate(toml, arguments.replace("--num-experts 8", "--num-experts 9"), run)
    assert refusal.value.where == "megatron_args.txt: num-experts"


KEYS = st.text(min_size=1, max_size=6)
PLAIN = st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
DOCUMENTS = st.recursive(
    st.dictionaries(KEYS, PLAIN | st.lists(PLAIN, max_size=3), max_size=4),
    lambda inner: st.dictionaries(KEYS, PLAIN | inner | st.lists(inner, min_size=1, max_size=2), max_size=3),
    max_leaves=8,
)


@given(DOCUMENTS)
def test_toml_reads_back(document: dict[str, Any]) -> None:
    assert tomllib.loads(to_toml(document)) == document


FLAGS = st.from_regex(r"[a-z][a-z0-9-]{0,10}", fullmatch=True)
WORDS = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=10)


@given(st.dictionaries(FLAGS, st.none() | WORDS), st.lists(WORDS, max_size=2))
def test_arguments_read_back(arguments: dict[str, str | None], comments: list[str]) -> None:
    assert parse_arguments(write_arguments(arguments, comments=comments)) == arguments


@pytest.mark.parametrize("line", ["num-layers 4", "--a b c", "--a 1\n--a 2"])
def test_lines_that_are_no_argument_are_refused(line: str) -> None:
    with pytest.raises(RecipeRefused, match="not one argument"):
        parse_arguments(line)


def test_a_value_without_a_form_is_refused() -> None:
    with pytest.raises(RecipeRefused, match="no form"):
        to_toml({"a": {"b": None}})
