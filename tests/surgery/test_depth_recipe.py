"""expand_depth on a pico model: the same function, deeper."""

import io
import json
from pathlib import Path

import pytest
import torch
from surgery_pico import Built, Workshop, build, damaged, gates, pico_config, random_tensors, shuffled

from recipes import expand_depth
from recipes.checkpoint import load_student
from recipes.model.transformer import Student
from recipes.names import layer_tensor
from recipes.ops.depth import source_layers
from recipes.params.expand_depth import Params
from recipes.tensors import TensorReader
from vpstore.errors import RecipeRefused, ShapeMismatch

PARENT = pico_config(attention="tpa")
DEEPER = pico_config(attention="tpa", num_layers=12)


def params(**changes: object) -> Params:
    return Params.model_validate({"model": DEEPER, "inserted_value_residual": 4.0, "check_tokens": 48, **changes})


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop.make(tmp_path_factory.mktemp("expand"), PARENT, random_tensors(PARENT))


@pytest.fixture(scope="module")
def built(workshop: Workshop) -> Built:
    return build(expand_depth, workshop.context(params()))


def test_both_gates_pass(built: Built) -> None:
    assert gates(built.report) == {
        "logits_max_abs_difference_float32": "passed",
        "logits_max_abs_difference_bfloat16": "passed",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_models_agree_bit_for_bit(built: Built, workshop: Workshop, dtype: torch.dtype) -> None:
    old = load_student(TensorReader(workshop.root / "parent"), PARENT, dtype=dtype)
    new = load_student(built.staged, DEEPER, dtype=dtype)
    ids = torch.randint(0, 60, (2, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(old.forward_hidden(ids), new.forward_hidden(ids))


def test_moved_layers_are_bits_and_inserted_ones_copies_with_silent_outputs(built: Built, workshop: Workshop) -> None:
    parent = TensorReader(workshop.root / "parent")
    for suffix in ("mlp.fc1.weight", "self_attn.a_q.weight", "self_attn.o_proj.weight", "self_attn.softmax_offset"):
        assert torch.equal(built.staged.read(layer_tensor(5, suffix)), parent.read(layer_tensor(2, suffix)))
    for suffix in ("mlp.fc1.weight", "input_layernorm.weight", "self_attn.b_v.weight", "self_attn.qkv_bias"):
        assert torch.equal(built.staged.read(layer_tensor(3, suffix)), parent.read(layer_tensor(1, suffix)))
    for suffix in expand_depth.ZEROED:
        assert not bool(built.staged.read(layer_tensor(3, suffix)).any())
        assert bool(built.staged.read(layer_tensor(5, suffix)).any())
    assert float(built.staged.read(layer_tensor(3, "self_attn.value_residual"))) == 4.0
    assert float(built.staged.read(layer_tensor(5, "self_attn.value_residual"))) == 2.0
    assert layer_tensor(1, "self_attn.value_residual") not in built.staged


def test_the_expansion_is_written_down(built: Built) -> None:
    files = {planned.name: planned for planned in built.plan.files}
    out = io.BytesIO()
    files["expansion.json"].write(out)
    assert json.loads(out.getvalue()) == {"map": [1, 5, 9, 12], "inserted": [2, 3, 4, 6, 7, 8, 10, 11]}
    assert {"config.json", "tokenizer.json", "special_tokens.json"} <= files.keys()


def test_a_shuffled_second_build_gives_the_same_bytes(built: Built, workshop: Workshop) -> None:
    again = build(expand_depth, workshop.context(params(), "again"), order=shuffled, with_check=False)
    assert again.bytes_by_shard() == built.bytes_by_shard()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (layer_tensor(3, "mlp.fc2.bias"), 0.01),
        (layer_tensor(8, "self_attn.o_proj.weight"), 0.01),
        (layer_tensor(9, "mlp.fc2.weight"), 1e30),
    ],
)
def test_a_damaged_model_misses_the_gates(built: Built, name: str, value: float, tmp_path: Path) -> None:
    broken = damaged(built, name, lambda tensor: tensor + value, tmp_path)
    assert set(gates(expand_depth.check(built.context, broken)).values()) == {"missed"}


@pytest.mark.parametrize("depth_map", [(1, 2, 3, 4), (1, 6, 7, 8), (1, 9, 10, 12)])
def test_any_valid_map_from_the_params_keeps_the_function(workshop: Workshop, depth_map: tuple[int, ...]) -> None:
    name = "map" + "-".join(map(str, depth_map))
    made = build(expand_depth, workshop.context(params(depth_map=depth_map), name))
    assert set(gates(made.report).values()) == {"passed"}


@pytest.mark.parametrize(
    ("depth_map", "condition"),
    [((1, 4, 8, 12), "keeps its role"), ((2, 5, 9, 12), "m\\(1\\) = 1"), ((1, 9, 5, 12), "strictly increasing")],
)
def test_an_invalid_map_is_refused_before_anything_is_computed(
    workshop: Workshop, depth_map: tuple[int, ...], condition: str
) -> None:
    with pytest.raises(RecipeRefused, match=condition):
        expand_depth.plan(workshop.context(params(depth_map=depth_map)))


def test_without_the_guard_a_lost_role_is_caught_by_the_shapes(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expand_depth, "require_valid_map", lambda *args, **rest: None)
    with pytest.raises(ShapeMismatch):
        expand_depth.plan(workshop.context(params(depth_map=(1, 4, 8, 12))))


def test_without_layer_one_in_its_place_the_logits_change(
    built: Built, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Negative control for m(1) = 1: a silent block at place 1 publishes other values, and all layers mix those in.
    # (A copy of layer 1 itself would publish the same ones; the condition is there for every other block.)
    sources = (2, *source_layers((2, 5, 9, 12), 12, global_every=4)[1:])
    monkeypatch.setattr(expand_depth, "source_layers", lambda *args, **rest: sources)
    monkeypatch.setattr(expand_depth, "require_valid_map", lambda *args, **rest: None)
    monkeypatch.setattr(expand_depth, "require_shapes", lambda *args: None)
    plan = expand_depth.plan(workshop.context(params(depth_map=(2, 5, 9, 12))))
    tensors = {tensor.name: tensor.compute() for tensor in plan.tensors}
    tensors[layer_tensor(2, "self_attn.value_residual")] = tensors.pop(layer_tensor(1, "self_attn.value_residual"))
    broken = Student(DEEPER)
    broken.load_state_dict(tensors)
    good = load_student(built.staged, DEEPER)
    ids = torch.randint(0, 60, (1, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        error = (broken.forward_hidden(ids) - good.forward_hidden(ids)).norm() / good.forward_hidden(ids).norm()
    assert float(error) > 0.01


def test_more_than_the_depth_is_refused(workshop: Workshop) -> None:
    wider = pico_config(attention="tpa", num_layers=12, ffn_hidden_size=64)
    with pytest.raises(RecipeRefused, match="more than the depth"):
        expand_depth.plan(workshop.context(params(model=wider)))
