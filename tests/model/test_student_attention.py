"""Attention of every kind of layer against the loops, and the traps that look harmless."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from student_builder import apart, attention_of, config_of
from student_reference import ReferenceAttention, factors, numpy_weights

from recipes.model.attention import NEUTRAL_OFFSET
from recipes.model.grape import rope_frequencies, rotary_tables, rotate
from recipes.model.precision import wide_dtype
from recipes.model.stream import Stream, document_runs, positions_within
from recipes.model.tiles import Heads, banded_tiles, causal_tiles, join_tiles, sink_attention
from recipes.model.tpa import compose
from vpstore.errors import RecipeRefused

KINDS = [("gqa", 1), ("gqa", 2), ("gqa", 4), ("tpa", 1), ("tpa", 2), ("tpa", 4)]


def input_of(tokens, *, rows=1, hidden=16, dtype=torch.float64, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, tokens, hidden, generator=generator, dtype=torch.float64).to(dtype)


def state_of(x, *, seed=5):
    """A state with RoPE tables, and values as if layer 1 had run."""
    state = Stream.of_rows(x.shape[1], device=x.device)
    frequency = rope_frequencies(128, base=1e6, dtype=wide_dtype(x.dtype))
    state.rotary = rotary_tables(state.positions_BT, frequency)
    generator = torch.Generator().manual_seed(seed)
    v1 = torch.randn(x.shape[0], x.shape[1], 2, 128, generator=generator, dtype=torch.float64)
    state.v1_BTKD = v1.to(x.dtype)
    return state


def attended(attention, x, state):
    return attention.attend(*attention.project(x), state)


@pytest.mark.parametrize(("mode", "number"), KINDS)
def test_attention_is_the_loop(mode, number):
    config = config_of(mode)
    attention = attention_of(config, number)
    x = input_of(9)
    state = state_of(x)
    v1 = state.v1_BTKD[0].numpy()
    out = attended(attention, x, state)
    expected, values = ReferenceAttention(config, number)(numpy_weights(attention.state_dict()), x[0].numpy(), v1)
    np.testing.assert_allclose(out[0].detach().numpy(), expected, rtol=0, atol=1e-10)
    if number == 1:
        np.testing.assert_allclose(state.v1_BTKD[0].detach().numpy(), values, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("mode", "number"), KINDS)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-5), (torch.bfloat16, 0.06)])
def test_narrow_dtypes_stay_close(mode, number, dtype, close):
    config = config_of(mode)
    x = input_of(40)
    exact = attended(attention_of(config, number), x, state_of(x))
    narrow = attended(attention_of(config, number, dtype), x.to(dtype), state_of(x.to(dtype)))
    assert narrow.dtype == dtype
    assert apart(narrow, exact) < close


@pytest.mark.parametrize("number", [2, 4])
def test_the_window_counts_the_current_token(number):
    config = config_of("tpa")
    attention = attention_of(config, number)
    x = input_of(135)
    out = attended(attention, x, state_of(x))[0, -1].detach().numpy()
    weights, v1 = numpy_weights(attention.state_dict()), state_of(x).v1_BTKD[0].numpy()
    kept = {}
    for window in (127, 128, 129, 10_000):
        # Only the last row is compared, so the loop over the others is left out.
        reference = ReferenceAttention(config, number, window=window)
        mix = reference._mix
        reference._mix = lambda i, *rest, mix=mix: mix(i, *rest) if i == 134 else np.zeros(128)  # type: ignore[method-assign]
        kept[window] = np.abs(reference(weights, x[0].numpy(), v1)[0][-1] - out).max()
    right = 128 if number == 2 else 10_000
    assert kept.pop(right) < 1e-10
    if number == 2:
        assert min(kept.values()) > 1e-5


def test_keys_at_distance_127_are_seen_and_at_128_are_not():
    attention = attention_of(config_of("tpa"), 2)
    x = input_of(300)
    state = state_of(x)
    q, k, v = attention.project(x)
    base = attention.attend(q, k, v, state)[0].detach()
    changed = v.clone()
    changed[0, 100] += 1
    moved = (attention.attend(q, k, changed, state)[0].detach() - base).abs().amax(-1) > 0
    assert moved.nonzero().flatten().tolist() == list(range(100, 228))


def test_flat_qkv_layout_is_another_model():
    """[Q0..Q7 K0 K1 V0 V1] is the original's fault: it loads, and means something else."""
    attention = attention_of(config_of("gqa"), 2)
    with torch.no_grad():
        attention.value_residual.fill_(10.0)
    x = input_of(12)
    grouped = attended(attention, x, state_of(x))
    with torch.no_grad():
        for tensor in (attention.qkv_proj.weight, attention.qkv_proj.bias):
            blocks = tensor.unflatten(0, (2, 6, 128))
            tensor.copy_(
                torch.cat([blocks[:, :4].flatten(0, 2), blocks[:, 4].flatten(0, 1), blocks[:, 5].flatten(0, 1)])
            )
    flat = attended(attention, x, state_of(x))
    cosine = torch.nn.functional.cosine_similarity(grouped.flatten(), flat.flatten(), dim=0)
    assert cosine.item() < 0.5


def test_project_reads_the_fused_rows_per_group():
    attention = attention_of(config_of("gqa"), 1)
    x = input_of(3)
    fused = attention.qkv_proj(x)[0]
    q, k, v = attention.project(x)
    for group in range(2):
        rows = fused[:, group * 768 : (group + 1) * 768]
        for slot in range(4):
            torch.testing.assert_close(
                q[0, :, group * 4 + slot], attention.q_norm(rows[:, slot * 128 : (slot + 1) * 128])
            )
        torch.testing.assert_close(k[0, :, group], attention.k_norm(rows[:, 512:640]))
        assert torch.equal(v[0, :, group], rows[:, 640:768])


def test_an_offset_of_zero_is_not_neutral():
    attention = attention_of(config_of("gqa"), 1)
    x = input_of(20)
    state = state_of(x)
    q, k, v = attention.project(x)
    lse = attention.log_sum_exp(q, k, state)[0]

    def with_offset(value):
        with torch.no_grad():
            attention.softmax_offset.fill_(value)
        return attention.attend(q, k, v, state)[0].unflatten(-1, (8, 128))

    full = with_offset(-1e4)
    kept = torch.exp(lse) / (torch.exp(lse) + 1)
    torch.testing.assert_close(with_offset(0.0), full * kept[..., None])
    assert kept.min().item() < 0.9
    torch.testing.assert_close(with_offset(NEUTRAL_OFFSET - 20), full, rtol=1e-9, atol=1e-9)


def test_log_sum_exp_is_the_visible_mass():
    for mode, number in KINDS:
        attention = attention_of(config_of(mode), number)
        with torch.no_grad():
            attention.softmax_offset.fill_(-1e4)
        x = input_of(150)
        state = state_of(x)
        q, k, _ = attention.project(x)
        ones = torch.zeros(1, 150, 2, 128, dtype=torch.float64)
        ones[:, 77] = 1.0  # mixing this picks out P(i, 77)
        state.v1_BTKD = ones
        share = attention.attend(q, k, ones, state)[0].unflatten(-1, (8, 128))[..., 0]
        lse = attention.log_sum_exp(q, k, state)[0]
        alone = torch.where(share > 0, torch.log(share) + lse, 0.0)
        i, h = 120, 5
        query, group = q[0, i, h], k[0, 77, h // 4]
        if attention.uses_rotary:
            query, group = rotate(q, state.rotary)[0, i, h], rotate(k, state.rotary)[0, 77, h // 4]
        score = (query @ group).item() / math.sqrt(128) - (2.0**-6 * 43 if attention.uses_alibi else 0)
        assert alone[i, h].item() == pytest.approx(score, abs=1e-9)


def test_value_residual_mixes_by_the_sigmoid():
    attention = attention_of(config_of("tpa"), 2)
    x = input_of(5)
    state = state_of(x)
    v = attention.project(x)[2]
    share = torch.sigmoid(attention.value_residual)
    torch.testing.assert_close(attention.mix_values(v, state), share * v + (1 - share) * state.v1_BTKD)


def test_a_layer_before_the_first_is_refused():
    attention = attention_of(config_of("tpa"), 2)
    x = input_of(5)
    state = state_of(x)
    state.v1_BTKD = None
    with pytest.raises(RecipeRefused, match="first layer's values"):
        attention(x, state)


def test_tpa_composes_heads_by_rank():
    config = config_of("tpa")
    attention = attention_of(config, 1)
    x = input_of(1)
    weights = numpy_weights(attention.state_dict())
    q = compose(attention.a_q(x), attention.b_q(x), rank=4)[0, 0].detach().numpy()
    v = compose(attention.a_v(x), attention.b_v(x), rank=2)[0, 0].detach().numpy()
    np.testing.assert_allclose(q, np.array(factors(weights, "q", x[0, 0].numpy(), 8, 4)), atol=1e-12)
    np.testing.assert_allclose(v, np.array(factors(weights, "v", x[0, 0].numpy(), 2, 2)), atol=1e-12)


def test_a_positive_scale_of_queries_and_keys_cancels_but_not_of_values():
    attention = attention_of(config_of("tpa"), 1)
    x = input_of(6)
    before = attention.project(x)
    with torch.no_grad():
        attention.qkv_bias.zero_()
        plain = attention.project(x)
        for factor in (attention.a_q, attention.a_k, attention.a_v):
            factor.weight.mul_(3.0)
    after = attention.project(x)
    torch.testing.assert_close(after[0], plain[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after[1], plain[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after[2], 3 * plain[2])
    assert not torch.equal(before[0], plain[0])


@settings(max_examples=15, deadline=None)
@given(tokens=st.integers(1, 420), cuts=st.lists(st.integers(1, 419), max_size=4), seed=st.integers(0, 99))
def test_banded_blocks_equal_one_big_mask(tokens, cuts, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, tokens, *heads, 8, generator=generator, dtype=torch.float64) for heads in ((2, 4), (2,), (2,))
    )
    documents = torch.zeros(2, tokens, dtype=torch.int64)
    for row, cut in enumerate(cuts):
        documents[row % 2, cut:] += 1
    offset = torch.randn(2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    heads = Heads(*(part.requires_grad_() for part in (q, k, v)))
    state = Stream.of(documents) if cuts else Stream.of_rows(tokens, device=q.device)
    outputs, gradients = [], []
    for tiles in (banded_tiles(heads, state, window=128), causal_tiles(heads, state, window=128, slopes_KG=None)):
        out = join_tiles([sink_attention(tile, offset) for tile in tiles], tokens=tokens)
        outputs.append(out.detach())
        gradients.append(torch.autograd.grad(out.square().sum(), [*heads, offset]))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-10, atol=1e-12)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_a_long_local_row_costs_memory_linear_in_its_tokens():
    attention = attention_of(config_of("tpa"), 2, torch.float32)
    sizes = []
    for tokens in (1024, 2048):
        x = input_of(tokens, dtype=torch.float32)
        state = state_of(x)
        with torch.no_grad():
            attended(attention, x, state)
        sizes.append(sum(bias.numel() for bias in state.shared.values()))
    assert sizes[1] == 2 * sizes[0] < 2048 * 2048 / 8


def test_gradients_of_the_softmax_with_offset():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 5, *heads, 4, generator=generator, dtype=torch.float64) for heads in ((2, 2), (2,), (2,)))
    offset = torch.randn(2, 2, generator=generator, dtype=torch.float64)
    state = Stream.of_rows(5, device=q.device)

    def mixed(q, k, v, offset):
        tiles = causal_tiles(Heads(q, k, v), state, window=None, slopes_KG=None)
        return join_tiles([sink_attention(tile, offset) for tile in tiles], tokens=5)

    inputs = [part.requires_grad_() for part in (q, k, v, offset)]
    assert torch.autograd.gradcheck(mixed, inputs)


def test_alibi_in_bfloat16_is_not_quantised():
    """A bias of 2047 / 2 would be off by up to 2 in bfloat16; the layer adds it in float32."""
    attention = attention_of(config_of("tpa"), 4, torch.bfloat16)
    state = state_of(input_of(1100, dtype=torch.bfloat16))
    attended(attention, input_of(1100, dtype=torch.bfloat16), state)
    biases = list(state.shared.values())
    assert {bias.dtype for bias in biases} == {torch.float32}
    assert float(biases[-1][0, 0, 0, -1, 0]) == -1099 / 2
    assert float(torch.tensor(-1099 / 2).to(torch.bfloat16)) != -1099 / 2


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30))
def test_positions_restart_with_every_run(documents):
    runs = document_runs(torch.tensor([documents]))
    positions = positions_within(runs)[0].tolist()
    number, position = 0, -1
    for index, document in enumerate(documents):
        fresh = index > 0 and document != documents[index - 1]
        number, position = (number + 1, 0) if fresh else (number, position + 1)
        assert (int(runs[0, index]), positions[index]) == (number, position)
