"""Router and experts against the loops; ties, exact zeros, balancing."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from student_builder import SMALL_MOE, apart, config_of, layer_of
from student_reference import chosen_experts, mixture, numpy_weights

from recipes.model.config import MoeConfig
from recipes.model.moe import MixtureOfExperts, Router
from recipes.model.routing import routing_statistics, top_by_index, top_in_groups
from recipes.model.stream import Stream

LOCKED = MoeConfig()
CONFIG = config_of("tpa", moe=SMALL_MOE)


def mixture_of(dtype=torch.float64, number=2):
    mlp = layer_of(CONFIG, number, dtype).mlp
    assert isinstance(mlp, MixtureOfExperts)
    return mlp


def input_of(rows, tokens, dtype=torch.float64, seed=0):
    return torch.randn(rows, tokens, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def state_of(tokens, *, collect=False):
    return Stream.of_rows(tokens, device=torch.device("cpu"), collect=collect)


def test_mixture_is_the_loop():
    mlp, x = mixture_of(), input_of(2, 11)
    out = mlp(x, state_of(11))
    weights = numpy_weights(mlp.state_dict())
    for b in range(2):
        for t in range(11):
            expected = mixture(weights, x[b, t].numpy(), SMALL_MOE)
            np.testing.assert_allclose(out[b, t].detach().numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("crowd", [None, 0, -1], ids=["spread", "first", "last"])
def test_experts_in_stacks_are_those_one_by_one(crowd, monkeypatch):
    """Stacks that do not divide the experts, experts without a row, a crowd in one, no row at all."""
    monkeypatch.setattr("recipes.model.moe._STACK", 3)
    experts = mixture_of().experts
    count = experts.fc1_weight.shape[0]
    sizes = [n % 4 if crowd is None else 0 for n in range(count)]
    if crowd is not None:
        sizes[crowd] = 13
    x = input_of(1, sum(sizes))[0]
    torch.testing.assert_close(experts.in_stacks(x, sizes), experts(x, sizes), rtol=0, atol=1e-12)
    assert experts.in_stacks(x[:0], [0] * count).shape == (0, 16)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_narrow_dtypes_stay_close(dtype, close):
    """On inputs whose choices do not hang on the rounding."""
    x = input_of(1, 60).to(torch.bfloat16).double()
    exact_mlp, narrow_mlp = mixture_of(), mixture_of(dtype)
    narrow = narrow_mlp(x.to(dtype), state_of(60))
    exact_choice = exact_mlp.router.choose(exact_mlp.router.scores(x[0])[1])
    narrow_choice = narrow_mlp.router.choose(narrow_mlp.router.scores(x[0].to(dtype))[1])
    same = (exact_choice.sort(-1).values == narrow_choice.sort(-1).values).all(-1)
    assert same.double().mean() > 0.8
    exact = exact_mlp(x, state_of(60))[0][same]
    assert narrow.dtype == dtype
    assert apart(narrow[0][same], exact) < close


def test_router_computes_in_float32_on_a_bfloat16_stream():
    router = mixture_of(torch.bfloat16).router
    logits, scores = router.scores(input_of(1, 4, torch.bfloat16)[0])
    assert (logits.dtype, scores.dtype) == (torch.float32, torch.float32)
    assert router.expert_bias.dtype == torch.float32
    assert router.weight.dtype == torch.bfloat16


def test_group_limit_at_four_of_eight_is_plain_top_four():
    """Every group that holds one of the global top 4 has a maximum at least as large as the fourth score."""
    scores = torch.rand(20_000, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(top_in_groups(scores, groups=8, keep=4, k=4), scores.topk(4, dim=-1).indices)
    tied = (scores * 50).floor()
    assert torch.equal(top_in_groups(tied, groups=8, keep=4, k=4), top_by_index(tied, 4))


def test_deepseeks_group_score_would_choose_others():
    """The sum of a group's two best is another rule: it changes a large share of the tokens."""
    scores = torch.rand(5_000, 256, generator=torch.Generator().manual_seed(0))
    grouped = scores.unflatten(-1, (8, 32))
    groups = grouped.topk(2, dim=-1).values.sum(-1).topk(4, dim=-1).indices
    kept = torch.zeros(5_000, 8, dtype=torch.bool).scatter_(-1, groups, True)
    other = grouped.masked_fill(~kept[..., None], -1).flatten(-2).topk(4, dim=-1).indices
    mine = top_in_groups(scores, groups=8, keep=4, k=4)
    changed = (other.sort(-1).values != mine.sort(-1).values).any(-1).double().mean()
    assert 0.3 < float(changed) < 0.6


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(8, 4, 4), (8, 2, 4), (4, 1, 4), (4, 4, 4), (2, 2, 2)]),
    st.lists(st.integers(0, 6), min_size=16, max_size=16),
)
def test_choice_is_the_loop_with_ties_to_the_lowest_index(shape, values):
    groups, keep, k = shape
    moe = MoeConfig(num_experts=16, num_groups=groups, top_groups=keep, top_k=k)
    chosen = top_in_groups(torch.tensor([values], dtype=torch.float64), groups=groups, keep=keep, k=k)[0].tolist()
    assert chosen == chosen_experts(np.array(values, dtype=np.float64), moe)


def test_equal_scores_go_to_the_first_experts():
    assert top_by_index(torch.zeros(3, 7), 4).tolist() == [[0, 1, 2, 3]] * 3


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-300, 300, width=32), min_size=16, max_size=16))
def test_gates_always_sum_to_the_scaling(logits):
    router = Router(4, SMALL_MOE)
    logits_NE = torch.tensor([logits])
    chosen = router.choose(torch.sigmoid(logits_NE))
    gates = router.gates(logits_NE, chosen)
    assert gates.sum().item() == pytest.approx(2.5, rel=1e-5)
    assert bool((gates >= 0).all())


def test_gates_use_the_score_without_the_bias():
    router = Router(4, SMALL_MOE)
    logits = torch.linspace(-2, 2, 16)[None]
    router.expert_bias[:4] = 10.0
    chosen = router.choose(torch.sigmoid(logits))
    assert sorted(chosen[0].tolist()) == [0, 1, 2, 3]
    scores = torch.sigmoid(logits[0, chosen[0]])
    torch.testing.assert_close(router.gates(logits, chosen)[0], 2.5 * scores / scores.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_fc2_gives_exactly_nothing(dtype):
    layer, dense = layer_of(CONFIG, 2, dtype), layer_of(config_of("tpa"), 2, dtype)
    mlp, x = layer.mlp, input_of(2, 50, dtype)
    with torch.no_grad():
        mlp.experts.fc2_weight.zero_()
        mlp.experts.fc2_bias.zero_()
    mlp.shared_expert.load_state_dict(dense.mlp.state_dict())
    assert not mlp.routed(x, state_of(50))[0].any()
    assert torch.equal(mlp(x, state_of(50)), dense.mlp(x))


def test_the_shared_experts_output_bias_is_applied():
    mlp, x = mixture_of(), input_of(1, 5)
    before = mlp(x, state_of(5))
    with torch.no_grad():
        mlp.shared_expert.fc2.bias += 1
    torch.testing.assert_close(mlp(x, state_of(5)), before + 1)


def test_gradients_equal_those_of_the_dense_formula():
    mlp, x = mixture_of(), input_of(1, 9).requires_grad_()
    parameters = [x, *mlp.parameters()]
    sorted_gradients = torch.autograd.grad(mlp(x, state_of(9)).square().sum(), parameters)
    logits, scores = mlp.router.scores(x[0])
    chosen = torch.zeros_like(scores).scatter(-1, mlp.router.choose(scores), 1.0)
    gates = 2.5 * scores * chosen / (scores * chosen).sum(-1, keepdim=True)
    e = mlp.experts
    inner = torch.relu(torch.einsum("th,efh->tef", x[0], e.fc1_weight) + e.fc1_bias).square()
    outer = torch.einsum("tef,ehf->teh", inner, e.fc2_weight) + e.fc2_bias
    dense = mlp.shared_expert(x[0]) + (gates[..., None] * outer).sum(1)
    for one, other in zip(sorted_gradients, torch.autograd.grad(dense.square().sum(), parameters), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_equal_calls_give_equal_bits():
    mlp, x = mixture_of(torch.float32), input_of(2, 64, torch.float32)
    assert torch.equal(mlp(x, state_of(64)), mlp(x, state_of(64)))


def test_balance_step_moves_by_the_sign():
    router = Router(4, SMALL_MOE)
    counts = torch.full((16,), 10)
    counts[2], counts[3] = 30, 0
    counts[4:] = torch.tensor([10] * 10 + [12, 8])
    router.update_expert_bias(counts)
    mean = float(counts.double().mean())
    expected = [1e-3 * np.sign(mean - int(count)) for count in counts]
    np.testing.assert_allclose(router.expert_bias.numpy(), expected, rtol=1e-6, atol=0)
    router.expert_bias.zero_()
    router.update_expert_bias(torch.full((16,), 7))
    assert not router.expert_bias.any()


def test_balance_loss_is_the_loop():
    scores = torch.sigmoid(torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64))
    total = 0.0
    for row in scores.numpy():
        share = row / row.sum(-1, keepdims=True)
        counts = np.zeros(16)
        for token in share:
            for expert in sorted(range(16), key=lambda e: (-token[e], e))[:4]:
                counts[expert] += 1
        total += 16 * sum(counts[e] / (4 * 7) * share[:, e].mean() for e in range(16))
    loss = routing_statistics(scores, torch.zeros(16), SMALL_MOE).balance_loss
    assert float(loss) == pytest.approx(1e-4 * total / 3, rel=1e-12)


def test_balance_loss_of_a_uniform_router_is_its_weight():
    statistics = routing_statistics(torch.full((2, 5, 256), 0.3), torch.zeros(256), LOCKED)
    assert float(statistics.balance_loss) == pytest.approx(1e-4, rel=1e-5)
    assert float(statistics.score_entropy) == pytest.approx(math.log(256), rel=1e-5)
    assert float(statistics.mean_scores_E.sum()) == pytest.approx(1, rel=1e-5)


def test_padding_is_left_out_of_the_statistics():
    """They are those of each row without its padding; taken with it, the control, they are not."""
    scores = torch.sigmoid(torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    kept = torch.arange(9) < torch.tensor([[9], [6]])
    found = routing_statistics(scores, torch.zeros(16), SMALL_MOE, kept_BT=kept)
    rows = [routing_statistics(row, torch.zeros(16), SMALL_MOE) for row in (scores[:1], scores[1:, :6])]
    assert float(found.balance_loss) == pytest.approx(sum(float(row.balance_loss) for row in rows) / 2, rel=1e-12)
    entropy = (9 * rows[0].score_entropy + 6 * rows[1].score_entropy) / 15
    assert float(found.score_entropy) == pytest.approx(float(entropy), rel=1e-12)
    mean = (9 * rows[0].mean_scores_E + 6 * rows[1].mean_scores_E) / 15
    torch.testing.assert_close(found.mean_scores_E, mean, rtol=1e-12, atol=0)
    with_padding = routing_statistics(scores, torch.zeros(16), SMALL_MOE)
    assert float(with_padding.balance_loss) != pytest.approx(float(found.balance_loss), rel=1e-6)


def test_experts_are_not_counted_for_padding():
    mlp, x = mixture_of(), input_of(2, 10)
    documents = torch.zeros(2, 10, dtype=torch.int64)
    documents[1, 6:] = -1
    padded, bare = Stream.of(documents, collect=True), Stream.of(documents.clamp(min=0), collect=True)
    assert bare.kept_BT is None
    out = mlp(x, padded)
    assert torch.equal(out, mlp(x, bare))  # what the layer computes is the same
    kept = mlp.router.choose(mlp.router.scores(torch.cat((x[0], x[1, :6])))[1])
    counts = torch.bincount(kept.flatten(), minlength=16)
    assert torch.equal(padded.routing[2].counts_E, counts)
    assert int(bare.routing[2].counts_E.sum()) == 2 * 10 * 4 > int(counts.sum()) == 16 * 4


def test_statistics_are_left_only_when_asked():
    mlp, x = mixture_of(), input_of(2, 10)
    quiet, loud = state_of(10), state_of(10, collect=True)
    mlp(x, quiet), mlp(x, loud)
    assert not quiet.routing
    assert int(loud.routing[2].counts_E.sum()) == 2 * 10 * 4
    gradient = torch.autograd.grad(loud.routing[2].balance_loss, mlp.router.weight)[0]
    assert bool(gradient.any())
