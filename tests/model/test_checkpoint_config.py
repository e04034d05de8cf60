"""config.json of students and donors, both ways."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from student_builder import SMALL_MOE, config_of

from recipes.checkpoint import donor_config_json, parse_donor_config, parse_student_config, student_config_json
from recipes.model.config import DonorConfig, MoeConfig, StudentConfig
from vpstore.errors import RecipeRefused

CONFIG = config_of("tpa", moe=SMALL_MOE)
TINY_DONOR = DonorConfig(hidden_size=8, num_hidden_layers=2, intermediate_size=12, vocab_size=64)

# The published config.json of Qwen3-0.6B.
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def configs():
    moes = st.none() | st.builds(
        MoeConfig,
        num_experts=st.sampled_from([8, 32, 256]),
        expert_hidden_size=st.integers(1, 300),
        shared_hidden_size=st.integers(1, 600),
        bias_update_rate=st.floats(1e-6, 1.0),
    )
    return st.builds(
        StudentConfig,
        hidden_size=st.integers(1, 4096),
        num_layers=st.integers(1, 30).map(lambda n: 4 * n),
        ffn_hidden_size=st.integers(1, 4096),
        attention=st.sampled_from(["gqa", "tpa"]),
        rope_base=st.floats(1.0, 1e8),
        norm_eps=st.floats(1e-9, 1e-3),
        moe=moes,
    )


@settings(max_examples=60, deadline=None)
@given(configs())
def test_student_config_round_trips_exactly(config):
    document = json.loads(json.dumps(student_config_json(config)))
    assert document["architectures"] == ["VpForCausalLM"]
    assert document["model_type"] == "vpmoe"
    assert parse_student_config(document) == config
    assert student_config_json(parse_student_config(document)) == document


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "qwen3"},
        {"architectures": ["Qwen3ForCausalLM"]},
        {"hidden_size": 0},
        {"hidden_size": "64"},
        {"window": 127},
        {"vocab_size": 151936},
        {"num_layers": 5},
        {"unheard_of": 1},
        {"moe": {"num_experts": 31}},
    ],
)
def test_student_configs_that_make_no_model_are_refused(change):
    with pytest.raises(RecipeRefused):
        parse_student_config({**student_config_json(CONFIG), **change})


@pytest.mark.parametrize("field", ["hidden_size", "rope_base", "moe"])
def test_student_configs_that_leave_something_open_are_refused(field):
    document = student_config_json(CONFIG)
    del document[field]
    with pytest.raises(RecipeRefused, match=field):
        parse_student_config(document)


def test_the_published_donor_config_is_read():
    config = parse_donor_config(QWEN3)
    expected = DonorConfig(hidden_size=1024, num_hidden_layers=28, intermediate_size=3072)
    assert config == expected
    assert config.rope_theta == 1e6
    newer = {key: value for key, value in QWEN3.items() if key not in ("rope_theta", "rope_scaling")}
    assert parse_donor_config({**newer, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}) == expected


def test_donor_config_round_trips():
    for config in (TINY_DONOR, TINY_DONOR.model_copy(update={"tie_word_embeddings": False, "vocab_size": 201088})):
        assert parse_donor_config(json.loads(json.dumps(donor_config_json(config)))) == config


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "llama"},
        {"attention_bias": True},
        {"hidden_act": "gelu"},
        {"use_sliding_window": True},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}},
        {"hidden_size": -1},
    ],
)
def test_donor_configs_with_other_arithmetic_are_refused(change):
    with pytest.raises(RecipeRefused):
        parse_donor_config({**QWEN3, **change})


def test_donor_configs_that_leave_something_open_are_refused():
    with pytest.raises(RecipeRefused, match="rope_theta"):
        parse_donor_config({key: value for key, value in QWEN3.items() if key != "rope_theta"})


def test_stock_transformers_reads_the_written_donor_config():
    from transformers import Qwen3Config

    stock = Qwen3Config.from_dict(donor_config_json(TINY_DONOR))
    assert (stock.hidden_size, stock.head_dim, stock.num_key_value_heads) == (8, 128, 8)
    assert stock.tie_word_embeddings
    assert stock.rope_parameters["rope_theta"] == 1e6
