"""M0: the real configs are the locked architecture, number by number."""

from __future__ import annotations

from pathlib import Path

import pytest
from parameter_counts import parameter_counts, parameter_totals

from recipes import config, run
from recipes.data.encodings import QWEN3
from recipes.model.config import DonorConfig, StudentConfig
from vpstore.checkout import Checkout
from vpstore.schema.ref import StageRef, parse_ref

ROOT = Path(__file__).resolve().parents[2]
COMMON = {
    "num_query_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 128,
    "vocab_size": 201088,
    "window": 128,
    "global_every": 4,
    "rope_base": 1e6,
    "norm_eps": 1e-6,
    "query_rank": 4,
    "kv_rank": 2,
    "max_sequence": 2048,
}
MOE = {
    "num_experts": 256,
    "expert_hidden_size": 128,
    "shared_hidden_size": 512,
    "top_k": 4,
    "num_groups": 8,
    "top_groups": 4,
    "routed_scaling": 2.5,
    "bias_update_rate": 1e-3,
    "balance_loss_weight": 1e-4,
}
# ref: what is its own, and the parameters that come out of the model
FULL = {
    "vpDense0-5_28@convert": ({"attention": "gqa", "num_layers": 28}, 514_769_147),
    "vpDense0-5_28@real-morph": ({"attention": "tpa", "num_layers": 28}, 504_619_323),
    "vpDense@expand": ({"attention": "tpa", "num_layers": 80}, 676_943_631),
    "vpMoE@upcycle": ({"attention": "tpa", "num_layers": 80}, 6_022_571_535),
}
TRAININGS = ("vpDense0-5_28@compat-heal", "vpDense0-5_28@real-heal", "vpDense@wake-up", "vpMoE@smoke")
# Where this project departs from the runbook's own configuration on purpose (docs/CHAIN.md); everything else is equal.
DELIBERATE = {
    "layer 1 of vpMoE keeps the dense FFN width": ("vpMoE@upcycle", 512, 128, 786_816),
}


def params(profile: str, ref: str) -> config.ParamsBase:
    checkout = Checkout.find(ROOT, profile=profile)
    stage = checkout.objects.find(parse_ref(ref))
    declared = checkout.objects.stage(stage)
    place = config.Place(stage.object, stage.stage, declared.mode, declared.recipe, declared.config)
    return config.stage_params(ROOT, profile=config.read_toml(checkout.profile_path), place=place)


def student(profile: str, ref: str) -> StudentConfig:
    found = params(profile, ref).model  # type: ignore[attr-defined]
    assert isinstance(found, StudentConfig)
    return found


@pytest.mark.parametrize("ref", FULL)
def test_full_size_is_locked(ref: str) -> None:
    own, total = FULL[ref]
    expected = {**COMMON, **own, "hidden_size": 1024, "ffn_hidden_size": 512}
    expected["moe"] = MOE if ref.startswith("vpMoE") else None
    model = student("upcycle", ref)
    assert model.model_dump() == expected
    assert parameter_totals(model)["total"] == total


def test_full_size_moe_has_the_published_groups() -> None:
    counts = parameter_counts(student("upcycle", "vpMoE@upcycle"))
    assert sum(counts.values()) == 6_022_571_535
    assert {5_324_898_304, 82_958_848, 20_729_600, 1_050_112} <= set(counts.values())
    assert 780_874_767 in parameter_totals(student("upcycle", "vpMoE@upcycle")).values()


@pytest.mark.parametrize("name", DELIBERATE)
def test_deliberate_differences_cost_what_is_written(name: str) -> None:
    ref, ours, theirs, parameters = DELIBERATE[name]
    model = student("upcycle", ref)
    assert model.ffn_hidden_size == ours
    narrow = model.model_copy(update={"ffn_hidden_size": theirs})
    total = sum(parameter_counts(model).values())
    assert total - sum(parameter_counts(narrow).values()) == parameters


@pytest.mark.parametrize("ref", FULL)
def test_tiny_shrinks_only_what_may_shrink(ref: str) -> None:
    full, tiny = student("upcycle", ref).model_dump(), student("tiny", ref).model_dump()
    may = {"hidden_size", "num_layers", "ffn_hidden_size", "moe"}
    assert {key for key in full if full[key] != tiny[key]} <= may
    if full["moe"]:
        smaller = {key for key in full["moe"] if full["moe"][key] != tiny["moe"][key]}
        assert smaller == {"num_experts", "expert_hidden_size", "shared_hidden_size"}


@pytest.mark.parametrize("ref", [r for r in FULL if r != "vpDense0-5_28@convert"])
def test_schedule_is_three_local_to_one_global(ref: str) -> None:
    model = student("upcycle", ref)
    roles = [model.is_global(layer) for layer in range(1, model.num_layers + 1)]
    assert roles == [False, False, False, True] * (model.num_layers // 4)
    assert [model.uses_tpa(layer) for layer in range(1, model.num_layers + 1)] == [not role for role in roles]


def test_donor_is_the_published_architecture() -> None:
    expect = params("upcycle", "qwen3-0_6B@main").expect  # type: ignore[attr-defined]
    published = DonorConfig(hidden_size=1024, num_hidden_layers=28, intermediate_size=3072)
    assert {key: value for key, value in expect.items() if key in DonorConfig.model_fields} == published.model_dump()


@pytest.mark.parametrize("profile", ["tiny", "upcycle"])
def test_every_stage_prepares_and_names_its_tokenizer(profile: str) -> None:
    checkout = Checkout.find(ROOT, profile=profile)
    for ref in checkout.objects.order:
        prepared = run.prepare(checkout, ref.object, ref.stage)
        assert prepared.tokenizer is not None
        donor = ref.object == "qwen3-0_6B" or ref.slug == "reports-qwen3-0_6B-main"
        assert prepared.tokenizer.padded_vocab == (151936 if donor else 201088)


@pytest.mark.parametrize("profile", ["tiny", "upcycle"])
@pytest.mark.parametrize("ref", TRAININGS)
def test_a_killed_training_has_something_to_go_on_from(profile: str, ref: str) -> None:
    """At least two states before the last step; the one after it is the result."""
    found = params(profile, ref).train  # type: ignore[attr-defined]
    assert (found.steps - 1) // found.save_every_steps >= 2


def test_profiles_have_the_same_tables() -> None:
    """One dvc.yaml serves every profile, so a table that one of them lacks would be a missing parameter."""

    def tables(value: object, path: str = "") -> set[str]:
        if not isinstance(value, dict):
            return set()
        return {path} | {t for key, inner in value.items() for t in tables(inner, f"{path}.{key}")}

    one, two = (config.read_toml(ROOT / f"configs/profiles/{name}.toml")["params"] for name in ("tiny", "upcycle"))
    assert tables(one) == tables(two)


def test_published_digests_of_the_real_donors_are_pinned() -> None:
    checkout = Checkout.find(ROOT, profile="upcycle")
    donor = {s.role: s.sha256 for s in run.prepare(checkout, "qwen3-0_6B", "main").sources}
    assert donor["donor/model.safetensors"] == "f47f71177f32bcd101b7573ec9171e6a57f4f4d31148d38e382306f42996874b"
    reference = {s.role: s.sha256 for s in run.prepare(checkout, "gpt-oss-20b", "main").sources}
    assert reference["donor/tokenizer.json"] == "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3"
    assert len([role for role in reference if role.endswith(".safetensors")]) == 3


@pytest.mark.parametrize("profile", ["tiny", "upcycle"])
def test_no_donor_goes_into_the_coefficients(profile: str) -> None:
    """A second donor of the vocabulary then has the same key, whatever its weights: nothing is solved again."""
    checkout = Checkout.find(ROOT, profile=profile)
    ref = StageRef("qwen3-o200k-coefficients", "main")
    seen, waiting = set(), [ref]
    while waiting:
        seen.add(one := waiting.pop())
        waiting += checkout.objects.stage(one).inputs.values()
    assert seen == {ref, StageRef("gpt-oss-20b", "main"), StageRef("o200k-harmony", "main")}
    [source] = run.prepare(checkout, ref.object, ref.stage).sources
    assert (source.role, source.sha256) == ("donor_vocabulary/qwen.tiktoken", QWEN3.ranks_sha256)
    inputs = checkout.objects.stage(StageRef("qwen3-0_6B-o200k", "transplant")).inputs
    assert inputs["coefficients"] == ref
    assert "reference" not in inputs
