"""Checkpoints: what they must contain, plans held against it, strict loading."""

import pytest
import torch
from safetensors.torch import save_file
from student_builder import SMALL_MOE, config_of, ids_of, student_of

from recipes.checkpoint import (
    expected_tensors,
    load_donor,
    load_student,
    require_shapes,
    tokenizer_files,
)
from recipes.model.config import DonorConfig, MoeConfig, StudentConfig
from recipes.model.donor import Donor
from recipes.planned import PlannedTensor
from recipes.recipe import InputArtifact
from recipes.tensors import TORCH_DTYPES, TensorReader
from vpstore.errors import RecipeRefused, ShapeMismatch

CONFIG = config_of("tpa", moe=SMALL_MOE)
FULL = StudentConfig(hidden_size=1024, num_layers=80, ffn_hidden_size=512, attention="tpa", moe=MoeConfig())
TINY_DONOR = DonorConfig(hidden_size=8, num_hidden_layers=2, intermediate_size=12, vocab_size=64)


@pytest.fixture(scope="module")
def stored():
    """A student's tensors as a checkpoint holds them, and the student that gives the same logits."""
    student = student_of(CONFIG, dtype=torch.float32).to(torch.bfloat16)
    return {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}


def reader_of(folder, tensors):
    save_file(tensors, folder / "model.safetensors")
    return TensorReader(folder)


def planned_tensors(config):
    return [
        PlannedTensor(
            name, dtype, shape, lambda shape=shape, dtype=dtype: torch.zeros(shape, dtype=TORCH_DTYPES[dtype])
        )
        for name, (dtype, shape) in expected_tensors(config).items()
    ]


def test_expected_tensors_of_the_full_size_model():
    found = expected_tensors(FULL)
    h = 1024
    layer = "model.layers.1."
    assert found["model.embed_tokens.weight"] == ("BF16", (201088, h))
    assert found["lm_head.weight"] == ("BF16", (201088, h))
    assert found["model.norm.weight"] == ("BF16", (h,))
    assert found["model.grape.log_freq"] == ("F32", (64,))
    expected = {
        "input_layernorm.weight": ("BF16", (h,)),
        "post_attention_layernorm.weight": ("BF16", (h,)),
        "self_attn.a_q.weight": ("BF16", (32, h)),
        "self_attn.a_k.weight": ("BF16", (4, h)),
        "self_attn.a_v.weight": ("BF16", (4, h)),
        "self_attn.b_q.weight": ("BF16", (512, h)),
        "self_attn.b_k.weight": ("BF16", (256, h)),
        "self_attn.b_v.weight": ("BF16", (256, h)),
        "self_attn.qkv_bias": ("BF16", (1536,)),
        "self_attn.o_proj.weight": ("BF16", (h, 1024)),
        "self_attn.o_proj.bias": ("BF16", (h,)),
        "self_attn.q_norm.weight": ("BF16", (128,)),
        "self_attn.k_norm.weight": ("BF16", (128,)),
        "self_attn.softmax_offset": ("F32", (8,)),
        "self_attn.value_residual": ("F32", ()),
        "mlp.router.weight": ("BF16", (256, h)),
        "mlp.router.bias": ("BF16", (256,)),
        "mlp.router.expert_bias": ("F32", (256,)),
        "mlp.experts.fc1_weight": ("BF16", (256, 128, h)),
        "mlp.experts.fc1_bias": ("BF16", (256, 128)),
        "mlp.experts.fc2_weight": ("BF16", (256, h, 128)),
        "mlp.experts.fc2_bias": ("BF16", (256, h)),
        "mlp.shared_expert.fc1.weight": ("BF16", (512, h)),
        "mlp.shared_expert.fc1.bias": ("BF16", (512,)),
        "mlp.shared_expert.fc2.weight": ("BF16", (h, 512)),
        "mlp.shared_expert.fc2.bias": ("BF16", (h,)),
    }
    assert {name.removeprefix(layer): spec for name, spec in found.items() if name.startswith(layer)} == expected
    assert found["model.layers.3.self_attn.qkv_proj.weight"] == ("BF16", (1536, h))
    assert found["model.layers.3.self_attn.qkv_proj.bias"] == ("BF16", (1536,))
    assert found["model.layers.0.mlp.fc1.weight"] == ("BF16", (512, h))
    assert "model.layers.0.self_attn.value_residual" not in found


def test_compat_mode_stores_no_frequencies():
    assert "model.grape.log_freq" not in expected_tensors(config_of("gqa"))


def test_expected_tensors_of_donors():
    found = expected_tensors(DonorConfig(hidden_size=1024, num_hidden_layers=28, intermediate_size=3072))
    assert "lm_head.weight" not in found
    assert found["model.layers.27.mlp.down_proj.weight"] == ("BF16", (1024, 3072))
    untied = expected_tensors(TINY_DONOR.model_copy(update={"tie_word_embeddings": False}))
    assert untied["lm_head.weight"] == ("BF16", (64, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_student_loads_with_the_same_logits(tmp_path, stored, dtype):
    loaded = load_student(reader_of(tmp_path, stored), CONFIG, dtype=dtype)
    ids = ids_of(1, 12)
    original = student_of(CONFIG, dtype=torch.float32).to(torch.bfloat16).to(dtype)
    with torch.no_grad():
        assert torch.equal(loaded.forward_hidden(ids), original.forward_hidden(ids))
    assert loaded.model.grape.log_freq.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.head_weight.dtype == dtype


def test_a_loaded_student_does_not_write_into_the_file(tmp_path, stored):
    before = reader_of(tmp_path, stored).read("model.grape.log_freq").clone()
    loaded = load_student(TensorReader(tmp_path), CONFIG)
    with torch.no_grad():
        loaded.model.grape.log_freq += 1
    assert torch.equal(TensorReader(tmp_path).read("model.grape.log_freq"), before)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight: missing"),
        (lambda t: t.update({"model.layers.9.extra": torch.zeros(2)}), "model.layers.9.extra: unexpected"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(17)}), "F32 [17]"),
        (lambda t: t.update({"model.grape.log_freq": torch.zeros(64, dtype=torch.bfloat16)}), "not F32 [64]"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(16, dtype=torch.int32)}), "I32 [16]"),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path, stored, damage, word):
    tensors = dict(stored)
    damage(tensors)
    with pytest.raises(RecipeRefused) as refused:
        load_student(reader_of(tmp_path, tensors), CONFIG)
    assert word in refused.value.found
    assert refused.value.exit_code == 20


def test_a_plan_that_fits_is_accepted():
    require_shapes(planned_tensors(CONFIG), CONFIG)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda plan: plan[1:], "model.embed_tokens.weight: missing"),
        (lambda plan: [*plan, plan[0]], "planned twice"),
        (
            lambda plan: [*plan, PlannedTensor("model.layers.0.odd", "BF16", (1,), lambda: torch.zeros(1))],
            "odd: unexpected",
        ),
        (lambda plan: [PlannedTensor(plan[0].name, "F32", plan[0].shape, plan[0].compute), *plan[1:]], "not BF16"),
        (lambda plan: [PlannedTensor(plan[0].name, "BF16", (3, 16), plan[0].compute), *plan[1:]], "[3, 16]"),
    ],
)
def test_plans_that_do_not_fit_are_refused_before_anything_is_computed(change, word):
    def never():
        raise AssertionError("a tensor was computed")

    plan = [PlannedTensor(one.name, one.dtype, one.shape, never) for one in planned_tensors(CONFIG)]
    with pytest.raises(ShapeMismatch) as refused:
        require_shapes(change(plan), CONFIG)
    assert word in refused.value.found


def test_many_faults_are_counted():
    with pytest.raises(ShapeMismatch, match="more"):
        require_shapes([], CONFIG)


def test_a_tied_donor_may_store_its_head_only_if_it_is_the_embedding(tmp_path):
    donor = Donor(TINY_DONOR).to(torch.bfloat16)
    tensors = {name: tensor.detach().clone() for name, tensor in donor.state_dict().items()}
    embedding = tensors["model.embed_tokens.weight"]
    (tmp_path / "same").mkdir(), (tmp_path / "other").mkdir()
    same = reader_of(tmp_path / "same", {**tensors, "lm_head.weight": embedding.clone()})
    loaded = load_donor(same, TINY_DONOR, dtype=torch.bfloat16)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids), donor(ids))
    other = reader_of(tmp_path / "other", {**tensors, "lm_head.weight": embedding + 1})
    with pytest.raises(RecipeRefused, match="tied"):
        load_donor(other, TINY_DONOR)


def test_tokenizer_files_are_copied(tmp_path):
    names = ("special_tokens.json", "tokenizer.json", "tokenizer_config.json")
    for name in names:
        (tmp_path / name).write_text(f'{{"name": "{name}"}}')
    artifact = InputArtifact("tokenizer", "o200k-harmony@main", "blake3:" + "0" * 64, tmp_path)
    files = tokenizer_files(artifact)
    assert sorted(one.name for one in files) == list(names)
    for one in files:
        with (tmp_path / "out").open("wb") as out:
            one.write(out)
        assert (tmp_path / "out").read_bytes() == (tmp_path / one.name).read_bytes()
    (tmp_path / "special_tokens.json").unlink()
    with pytest.raises(RecipeRefused, match="special_tokens.json"):
        tokenizer_files(artifact)
