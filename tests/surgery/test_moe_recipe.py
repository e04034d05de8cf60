"""upcycle_moe on a pico model: the same function with experts."""

from pathlib import Path

import pytest
import torch
from surgery_pico import Built, Workshop, build, damaged, gates, pico_config, random_tensors, shuffled

from recipes import upcycle_moe
from recipes.checkpoint import load_student
from recipes.model.config import MoeConfig, StudentConfig
from recipes.model.moe import MixtureOfExperts
from recipes.model.routing import top_by_index, top_in_groups
from recipes.names import layer_tensor
from recipes.params.upcycle_moe import Params
from recipes.tensors import TensorReader
from vpstore.errors import RecipeRefused

MOE = MoeConfig(num_experts=32, expert_hidden_size=8, shared_hidden_size=32)
PARENT = pico_config(attention="tpa")
SPARSE = pico_config(attention="tpa", moe=MOE)
DEFAULTS = {
    "model": SPARSE,
    "method": "R0",
    "seed": 11,
    "fc1_noise": 0.02,
    "drop_fraction": 0.5,
    "routed_share": 0.625,
    "router_std": 0.16,
    "calibration_tokens": 1500,
    "calibration_sequence": 256,
    "check_tokens": 48,
    "max_relative_error": 1e-3,
    "min_router_entropy": 0.8,
    "max_expert_load": 0.15,
}
R1 = {"method": "R1", "drop_fraction": 0.0, "fc1_noise": 0.0, "min_router_entropy": 0.5, "max_expert_load": 0.25}


def params(**changes: object) -> Params:
    return Params.model_validate({**DEFAULTS, **changes})


def sparse(**changes: object) -> StudentConfig:
    return pico_config(attention="tpa", moe=MoeConfig.model_validate({**MOE.model_dump(), **changes}))


def expert(layer: int, suffix: str) -> str:
    return layer_tensor(layer, f"mlp.experts.{suffix}")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop.make(tmp_path_factory.mktemp("upcycle"), PARENT, random_tensors(PARENT))


@pytest.fixture(scope="module")
def exact(workshop: Workshop) -> Built:
    return build(upcycle_moe, workshop.context(params()))


@pytest.fixture(scope="module")
def shared(workshop: Workshop) -> Built:
    return build(upcycle_moe, workshop.context(params(**R1), "r1"))


def test_r0_passes_its_gates(exact: Built) -> None:
    assert gates(exact.report) == {
        "logits_max_abs_difference": "passed",
        "router_load_entropy": "passed",
        "router_max_load": "passed",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_r0_is_the_dense_model_bit_for_bit(exact: Built, workshop: Workshop, dtype: torch.dtype) -> None:
    old = load_student(TensorReader(workshop.root / "parent"), PARENT, dtype=dtype)
    new = load_student(exact.staged, SPARSE, dtype=dtype)
    ids = torch.randint(0, 60, (2, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(old.forward_hidden(ids), new.forward_hidden(ids))


def test_r0_experts_are_noisy_slices_with_redrawn_units(exact: Built, workshop: Workshop) -> None:
    parent = TensorReader(workshop.root / "parent")
    dense = parent.read(layer_tensor(3, "mlp.fc1.weight")).float()
    got = exact.staged.read(expert(3, "fc1_weight")).float()
    relative = torch.stack(
        [((got[e] - dense[8 * (e % 4) : 8 * (e % 4) + 8]).norm(dim=1) / dense.std()) for e in range(32)]
    )
    assert (relative < 0.5).sum(dim=1).tolist() == [4] * 32
    assert not bool(exact.staged.read(expert(3, "fc2_weight")).any())
    assert not bool(exact.staged.read(expert(3, "fc2_bias")).any())
    assert not torch.equal(exact.staged.read(expert(2, "fc1_weight")), exact.staged.read(expert(3, "fc1_weight")))


def test_layer_one_stays_dense_and_the_shared_expert_is_the_dense_layer(exact: Built, workshop: Workshop) -> None:
    parent = TensorReader(workshop.root / "parent")
    for suffix in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
        first = layer_tensor(1, f"mlp.{suffix}")
        assert torch.equal(exact.staged.read(first), parent.read(first))
        moved = exact.staged.read(layer_tensor(4, f"mlp.shared_expert.{suffix}"))
        assert torch.equal(moved, parent.read(layer_tensor(4, f"mlp.{suffix}")))
    assert not any(".router." in name for name in exact.staged.names() if name.startswith("model.layers.0."))


def test_the_router_starts_random_without_biases(exact: Built) -> None:
    for layer in (2, 3, 4):
        weight = exact.staged.read(layer_tensor(layer, "mlp.router.weight")).float()
        assert float(weight.std()) == pytest.approx(0.16, rel=0.15)
        assert len({tuple(row) for row in weight.tolist()}) == 32
        assert not bool(exact.staged.read(layer_tensor(layer, "mlp.router.bias")).any())
        bias = exact.staged.read(layer_tensor(layer, "mlp.router.expert_bias"))
        assert bias.dtype == torch.float32
        assert not bool(bias.any())


def test_a_shuffled_second_build_gives_the_same_bytes(exact: Built, workshop: Workshop) -> None:
    again = build(upcycle_moe, workshop.context(params(), "again"), order=shuffled, with_check=False)
    assert again.bytes_by_shard() == exact.bytes_by_shard()


def test_another_seed_changes_the_experts_and_nothing_else(exact: Built, workshop: Workshop) -> None:
    other = build(upcycle_moe, workshop.context(params(seed=12), "seed"), with_check=False)
    changed = {
        name for name in exact.staged.names() if not torch.equal(exact.staged.read(name), other.staged.read(name))
    }
    suffixes = {name.split(".mlp.")[1] for name in changed}
    assert suffixes == {"experts.fc1_weight", "experts.fc1_bias", "router.weight"}


@pytest.mark.parametrize(
    ("name", "gate"),
    [
        (expert(3, "fc2_bias"), "logits_max_abs_difference"),
        (expert(2, "fc2_weight"), "logits_max_abs_difference"),
        (layer_tensor(4, "mlp.shared_expert.fc2.bias"), "logits_max_abs_difference"),
    ],
)
def test_a_damaged_r0_misses_its_gate(exact: Built, tmp_path: Path, name: str, gate: str) -> None:
    broken = damaged(exact, name, lambda tensor: tensor + 0.01, tmp_path)
    assert gates(upcycle_moe.check(exact.context, broken))[gate] == "missed"


def test_a_collapsed_router_misses_both_router_gates(exact: Built, tmp_path: Path) -> None:
    # All scores equal: every token goes to the experts of lowest index.
    broken = damaged(exact, layer_tensor(3, "mlp.router.weight"), torch.zeros_like, tmp_path)
    found = gates(upcycle_moe.check(exact.context, broken))
    assert (found["router_load_entropy"], found["router_max_load"]) == ("missed", "missed")
    assert found["logits_max_abs_difference"] == "passed"


def test_r1_passes_its_gates(shared: Built) -> None:
    assert set(gates(shared.report).values()) == {"passed"}
    assert {"logits_relative_difference", "split_virtual_groups"} <= gates(shared.report).keys()


def test_r1_sends_every_token_to_one_whole_group(shared: Built) -> None:
    model = load_student(shared.staged, SPARSE)
    layer = model.layers[2].mlp
    assert isinstance(layer, MixtureOfExperts)
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(2))
    chosen = layer.router.choose(layer.router.scores(x)[1])
    groups = chosen // 4
    assert bool((groups == groups[:, :1]).all())
    assert torch.equal(chosen.sort(dim=1).values % 4, torch.arange(4).expand(500, 4))
    assert len(set(groups[:, 0].tolist())) > 4


def test_r1_with_the_original_tools_scale_is_far_off(shared: Built, tmp_path: Path) -> None:
    # 4^(1/3) instead of 1 (share 0.625): the routed part is four times what it should be.
    broken = damaged(shared, expert(3, "fc2_weight"), lambda tensor: tensor * 4, tmp_path)
    assert gates(upcycle_moe.check(shared.context, broken))["logits_relative_difference"] == "missed"


def test_r2_is_labelled_an_ablation_and_is_not_exact(workshop: Workshop) -> None:
    made = build(upcycle_moe, workshop.context(params(method="R2", drop_fraction=0.0), "r2"))
    assert made.report is not None
    figures = made.report.metrics["upcycle"]
    assert figures["is_ablation"] is True
    assert figures["logits_relative_difference"] > 0.01
    assert "logits_relative_difference" not in gates(made.report)


def test_group_limiting_is_plain_top_four() -> None:
    # With top_k = top_groups every group that holds a top-4 expert is among the four best groups.
    scores = torch.sigmoid(torch.randn(5000, 256, generator=torch.Generator().manual_seed(3)))
    limited = top_in_groups(scores, groups=8, keep=4, k=4)
    assert torch.equal(limited, top_by_index(scores, 4))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": PARENT}, "no experts"),
        ({"model": pico_config(attention="tpa", num_layers=8, moe=MOE)}, "not its parent with experts"),
        ({"model": sparse(shared_hidden_size=64)}, "cannot be cut"),
        ({"model": sparse(expert_hidden_size=12)}, "cannot be cut"),
        ({"model": sparse(num_experts=30, num_groups=5)}, "cannot be cut"),
        ({"method": "R1", "drop_fraction": 0.5}, "cannot be cut"),
        ({"method": "R1", "drop_fraction": 0.0, "model": sparse(expert_hidden_size=16)}, "cannot be cut"),
        ({"method": "R2", "model": sparse(num_experts=16)}, "cannot be cut"),
    ],
)
def test_what_cannot_be_upcycled_is_refused(workshop: Workshop, changes: dict[str, object], expected: str) -> None:
    with pytest.raises(RecipeRefused, match=expected):
        upcycle_moe.intermediates(workshop.context(params(**changes)))
