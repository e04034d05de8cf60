"""The whole student: logits against the loops, documents, identity blocks, gradients, full-size shapes and counts."""

import pytest
import torch
from parameter_counts import meta_student, parameter_counts, parameter_totals
from student_builder import SMALL_MOE, apart, config_of, ids_of, student_of
from student_reference import logits_of, numpy_weights

from recipes.model.config import MoeConfig, StudentConfig
from recipes.model.health import balance_loss
from recipes.model.transformer import Student
from vpstore.errors import ShapeMismatch

MODELS = {"compat": config_of("gqa"), "real": config_of("tpa"), "moe": config_of("tpa", moe=SMALL_MOE)}
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 140 + [2] * 195])


def full_size(layers, attention, *, ffn=512, moe=None):
    return StudentConfig(hidden_size=1024, num_layers=layers, ffn_hidden_size=ffn, attention=attention, moe=moe)


FULL = {
    "compat-28": full_size(28, "gqa"),
    "real-28": full_size(28, "tpa"),
    "vpDense": full_size(80, "tpa"),
    "vpMoE, layer 1 of 128": full_size(80, "tpa", ffn=128, moe=MoeConfig()),
    "vpMoE": full_size(80, "tpa", moe=MoeConfig()),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_loops(name):
    config = MODELS[name]
    student, ids = student_of(config), ids_of(1, 8)
    expected = torch.from_numpy(logits_of(numpy_weights(student.state_dict()), ids[0].tolist(), config))
    with torch.no_grad():
        assert apart(student(ids)[0], expected) < 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_equal_separate_ones(name):
    student, ids = student_of(MODELS[name]), ids_of(1, DOCUMENTS.shape[1])
    with torch.no_grad():
        packed = student.forward_hidden(ids, DOCUMENTS)[0]
        alone = [student.forward_hidden(part)[0] for part in ids.split([5, 140, 195], dim=1)]
        together = student.forward_hidden(ids)[0]
    assert apart(packed, torch.cat(alone)) < 1e-10
    assert apart(packed[:5], together[:5]) < 1e-10
    assert apart(packed[5:], together[5:]) > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_no_token_sees_a_later_one(name):
    student, ids = student_of(MODELS[name]), ids_of(1, 300)
    other = ids.clone()
    other[0, 290] += 1
    with torch.no_grad():
        before, after = student.forward_hidden(ids)[0], student.forward_hidden(other)[0]
    torch.testing.assert_close(before[:290], after[:290], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before[290:], after[290:])


def test_rows_of_a_batch_do_not_mix():
    student, ids = student_of(MODELS["moe"]), ids_of(3, 40)
    documents = torch.stack([torch.arange(40) // size for size in (7, 40, 13)])
    with torch.no_grad():
        batch = student.forward_hidden(ids, documents)
        rows = [student.forward_hidden(ids[i : i + 1], documents[i : i + 1]) for i in range(3)]
    assert apart(batch, torch.cat(rows)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["real", "moe"])
def test_zeroed_blocks_leave_the_stream_bitwise(name, dtype):
    student = student_of(MODELS[name], dtype=dtype)
    with torch.no_grad():
        for layer in student.layers[1:]:
            silent = [layer.self_attn.o_proj]
            if name == "moe":
                silent.append(layer.mlp.shared_expert.fc2)
                layer.mlp.experts.fc2_weight.zero_()
                layer.mlp.experts.fc2_bias.zero_()
            else:
                silent.append(layer.mlp.fc2)
            for projection in silent:
                projection.weight.zero_()
                projection.bias.zero_()
        x, state = student.start(ids_of(2, 300))
        x = student.layers[0](x, state)
        for layer in student.layers[1:]:
            assert torch.equal(layer(x, state), x)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recompute", [False, True])
def test_every_parameter_receives_gradient(name, recompute):
    student, ids = student_of(MODELS[name]), ids_of(2, 150)
    student.recompute = recompute
    hidden, state = student.hidden_and_state(ids, collect=True)
    loss = torch.logsumexp(hidden @ student.head_weight[:500].T, dim=-1).mean() + balance_loss(state.routing)
    loss.backward()
    for parameter_name, parameter in student.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert bool(torch.isfinite(parameter.grad).all()), parameter_name
        assert bool(parameter.grad.any()), parameter_name


def test_recomputing_gives_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        student = student_of(MODELS["moe"])
        student.recompute = recompute
        hidden, state = student.hidden_and_state(ids_of(1, 40), collect=True)
        (hidden.square().sum() + balance_loss(state.routing)).backward()
        gradients.append([parameter.grad for parameter in student.model.parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, kept, rtol=1e-12, atol=1e-12)


def test_bfloat16_keeps_what_is_pinned_in_float32():
    student = student_of(MODELS["moe"], dtype=torch.float32).to(torch.bfloat16)
    wide = {name for name, tensor in student.state_dict().items() if tensor.dtype == torch.float32}
    pinned = ("log_freq", "softmax_offset", "value_residual", "expert_bias")
    assert wide == {name for name in student.state_dict() if name.endswith(pinned)}
    assert len(wide) == 1 + 4 + 3 + 3
    assert {tensor.dtype for tensor in student.state_dict().values()} == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("name", ["compat", "real"])
def test_bfloat16_logits_stay_close(name):
    student, ids = student_of(MODELS[name], dtype=torch.float32), ids_of(1, 64)
    with torch.no_grad():
        exact = student.forward_hidden(ids)
        assert apart(student.to(torch.bfloat16).forward_hidden(ids), exact) < 0.1


def test_layers_run_alone_as_in_the_model():
    student, ids = student_of(MODELS["moe"]), ids_of(2, 20)
    with torch.no_grad():
        x, state = student.start(ids)
        assert [layer.number for layer in student.layers] == [1, 2, 3, 4]
        for layer in student.layers:
            normed = layer.input_layernorm(x)
            q, k, v = layer.self_attn.project(normed)
            x = x + layer.self_attn.o_proj(layer.self_attn.attend(q, k, v, state))
            x = x + layer.feed_forward(layer.post_attention_layernorm(x), state)
        assert torch.equal(student.model.norm(x), student.forward_hidden(ids))


def test_drawing_depends_on_the_generator_alone():
    student = Student(config_of("tpa", moe=SMALL_MOE))
    student.draw(torch.Generator().manual_seed(7))
    first = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    student.layers[1].mlp.router.expert_bias += 1
    student.draw(torch.Generator().manual_seed(8))
    assert not torch.equal(student.head_weight, first["lm_head.weight"])
    student.draw(torch.Generator().manual_seed(7))
    assert all(torch.equal(tensor, first[name]) for name, tensor in student.state_dict().items())


def test_tables_of_another_shape_are_refused():
    student = meta_student(config_of("tpa"))
    with pytest.raises(ShapeMismatch):
        student.start(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ShapeMismatch):
        student.start(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("name", "total", "non_embedding"),
    [
        ("compat-28", 514_769_147, 102_940_923),
        ("real-28", 504_619_323, 92_791_099),
        ("vpDense", 676_943_631, 265_115_407),
        ("vpMoE, layer 1 of 128", 6_021_784_719, 5_609_956_495),
        ("vpMoE", 6_022_571_535, 5_610_743_311),
    ],
)
def test_full_size_totals(name, total, non_embedding):
    totals = parameter_totals(FULL[name])
    assert (totals["total"], totals["non_embedding"]) == (total, non_embedding)
    if FULL[name].moe is None:
        assert (totals["active"], totals["active_non_embedding"]) == (total, non_embedding)


def test_full_size_active_parameters():
    small, locked = parameter_totals(FULL["vpMoE, layer 1 of 128"]), parameter_totals(FULL["vpMoE"])
    assert (small["active"], small["active_non_embedding"]) == (780_087_951, 368_259_727)
    assert (locked["active"], locked["active_non_embedding"]) == (780_874_767, 369_046_543)


def test_full_size_groups():
    table = {
        "embedding": [205_914_112] * 5,
        "head": [205_914_112] * 5,
        "global_attention": [73_472_000, 18_368_000, 52_480_000, 52_480_000, 52_480_000],
        "local_attention": [0, 44_954_112, 128_440_320, 128_440_320, 128_440_320],
        "norms": [58_368, 58_368, 164_864, 164_864, 164_864],
        "qk_norm": [7_168, 7_168, 20_480, 20_480, 20_480],
        "softmax_offset": [224, 224, 640, 640, 640],
        "value_residual": [27, 27, 79, 79, 79],
        "grape": [0, 64, 64, 64, 64],
        "dense_ffn": [29_403_136, 29_403_136, 84_008_960, 263_296, 1_050_112],
        "routed_experts": [0, 0, 0, 5_324_898_304, 5_324_898_304],
        "shared_experts": [0, 0, 0, 82_958_848, 82_958_848],
        "router": [0, 0, 0, 20_729_600, 20_729_600],
    }
    found = [parameter_counts(config) for config in FULL.values()]
    assert {group: [counts[group] for counts in found] for group in table} == table
    assert all(
        sum(counts.values()) == parameter_totals(c)["total"] for counts, c in zip(found, FULL.values(), strict=True)
    )


def test_roles_of_full_size_layers():
    student = meta_student(FULL["vpMoE"])
    windows = [layer.self_attn.window for layer in student.layers]
    assert windows == [None if number % 4 == 0 else 128 for number in range(1, 81)]
    assert [layer.self_attn.uses_rotary for layer in student.layers] == [number % 4 != 0 for number in range(1, 81)]
    assert [hasattr(layer.mlp, "router") for layer in student.layers] == [False] + [True] * 79
    assert student.layers[0].mlp.fc1.weight.shape == (512, 1024)
    assert student.layers[0].self_attn.value_residual is None
    assert not student.state_dict()["model.layers.1.mlp.router.expert_bias"].requires_grad
