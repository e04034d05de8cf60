"""The student on a CUDA device: the same numbers as on the CPU, and the same bits twice."""

import copy

import pytest
import torch
from student_builder import SMALL_MOE, apart, config_of, ids_of, student_of

from recipes.model.health import balance_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MODELS = {"compat": config_of("gqa"), "real": config_of("tpa"), "moe": config_of("tpa", moe=SMALL_MOE)}


def gradients(student, ids, documents):
    """Hidden states and all gradients of one training step's loss."""
    hidden, state = student.hidden_and_state(ids, documents, collect=True)
    loss = hidden.float().square().mean() + balance_loss(state.routing).to(hidden.device)
    parameters = list(student.model.parameters())
    return [hidden.detach(), *torch.autograd.grad(loss, parameters)]


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", MODELS)
def test_cuda_equals_the_cpu(name):
    student, ids = student_of(MODELS[name]), ids_of(2, 300)
    documents = (torch.arange(300) // 170)[None].expand(2, -1)
    expected = gradients(student, ids, documents)
    found = gradients(copy.deepcopy(student).cuda(), ids.cuda(), documents.cuda())
    for one, other in zip(found, expected, strict=True):
        assert apart(one.cpu(), other) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_two_steps_on_cuda_give_the_same_bits(name, dtype, deterministic):
    student, ids = student_of(MODELS[name], dtype=dtype).cuda(), ids_of(2, 300).cuda()
    first, second = gradients(student, ids, None), gradients(student, ids, None)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert bool(all(torch.isfinite(one).all() for one in first))


@pytest.mark.parametrize("name", ["compat", "real"])
def test_bfloat16_on_cuda_stays_close(name):
    student, ids = student_of(MODELS[name], dtype=torch.float32), ids_of(1, 64)
    with torch.no_grad():
        exact = student.forward_hidden(ids)
        found = student.to("cuda", torch.bfloat16).forward_hidden(ids.cuda())
    assert student.model.grape is None or student.model.grape.log_freq.dtype == torch.float32
    assert apart(found.cpu(), exact) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_experts_equal_the_dense_parent_on_cuda(dtype):
    moe, dense = student_of(MODELS["moe"], dtype=dtype), student_of(MODELS["real"], dtype=dtype)
    shared = {name.replace(".mlp.", ".mlp.shared_expert."): tensor for name, tensor in dense.state_dict().items()}
    shared.update({name: tensor for name, tensor in dense.state_dict().items() if name.startswith("model.layers.0.")})
    moe.load_state_dict({name: tensor for name, tensor in shared.items() if name in moe.state_dict()}, strict=False)
    with torch.no_grad():
        for layer in moe.layers[1:]:
            layer.mlp.experts.fc2_weight.zero_()
            layer.mlp.experts.fc2_bias.zero_()
        ids = ids_of(2, 300).cuda()
        assert torch.equal(moe.cuda().forward_hidden(ids), dense.cuda().forward_hidden(ids))
