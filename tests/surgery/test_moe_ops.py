"""Noise by name, expert slices, router rows and the load histogram, against slow loops."""

import math
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recipes.ops.experts import Draw, expert_fc1, expert_fc2, routed_scale, slice_units
from recipes.ops.noise import chosen_units, normal, normal_rows, row_ranges, stream
from recipes.ops.router import router_rows, spread, without_direction
from vpstore.errors import ShapeMismatch

QUIET = Draw(seed=1, name="fc1", units="layer 2")


def whole(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(parts))


def counts(picks: Tensor, experts: int) -> Tensor:
    return torch.bincount(picks.flatten(), minlength=experts)


def squared_relu_layer(x_TD: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    return torch.relu(x_TD @ w1.T + b1).square() @ w2.T


def test_streams_belong_to_seed_and_name_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = normal((3, 5), seed=7, name="a")
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first, normal((3, 5), seed=7, name="a"))
    assert not torch.equal(first, normal((3, 5), seed=8, name="a"))
    assert not torch.equal(first, normal((3, 5), seed=7, name="b"))
    assert not torch.equal(normal((4,), seed=1, name="1a"), normal((4,), seed=11, name="a"))


def test_the_stream_is_the_one_the_digest_names() -> None:
    # Golden: a change of the digest or of the byte order would change every expert ever published.
    values = normal((4,), seed=1337, name="model.layers.1.mlp.experts.fc1_weight#noise")
    assert values.tolist() == pytest.approx([0.109224, -0.847697, -1.457276, 0.597315], abs=1e-5)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(1, 200))
def test_noise_in_ranges_is_the_noise_of_one_draw(shape: list[int], values: int) -> None:
    ranges = row_ranges(shape, values=values)
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(shape[0]))
    parts = list(normal_rows(shape, ranges, draw=(7, "a"), mean=0.25, std=2.0))
    assert max(part.numel() for part in parts) <= max(values, 1) + 16 * 40 * 40
    assert torch.equal(whole(parts), normal(tuple(shape), seed=7, name="a", mean=0.25, std=2.0))


def test_ranges_cut_anywhere_else_would_change_the_noise() -> None:
    """Negative control: torch draws sixteen values together."""
    assert len(row_ranges((40, 3), values=30)) > 1
    generator = stream(7, "a")
    elsewhere = [torch.randn((10, 3), generator=generator) for _ in range(4)]
    assert not torch.equal(whole(elsewhere), normal((40, 3), seed=7, name="a"))


def test_moments_of_the_noise() -> None:
    values = normal((400, 500), seed=3, name="m", mean=0.5, std=2.0)
    assert float(values.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(values.std()) == pytest.approx(2.0, rel=0.01)


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.floats(0, 1))
def test_chosen_units_are_exactly_as_many(rows: int, units: int, fraction: float) -> None:
    chosen = chosen_units(rows, units, fraction, seed=1, name="u")
    assert chosen.sum(dim=1).tolist() == [math.floor(fraction * units + 0.5)] * rows


def test_chosen_units_differ_between_rows_and_reach_every_unit() -> None:
    chosen = chosen_units(64, 8, 0.5, seed=1, name="u")
    assert len({tuple(row) for row in chosen.tolist()}) > 30
    assert bool(chosen.any(dim=0).all())


@pytest.mark.parametrize(("units", "width", "experts"), [(32, 8, 32), (12, 3, 8), (8, 8, 2)])
def test_slices_against_a_loop(units: int, width: int, experts: int) -> None:
    dense = torch.randn(units, 5)
    got = slice_units(dense, experts=experts, width=width)
    for expert in range(experts):
        quarter = expert % (units // width)
        assert torch.equal(got[expert], dense[quarter * width : (quarter + 1) * width])


@pytest.mark.parametrize(("units", "width", "experts"), [(30, 8, 32), (32, 8, 6)])
def test_uneven_slices_are_refused(units: int, width: int, experts: int) -> None:
    with pytest.raises(ShapeMismatch):
        slice_units(torch.zeros(units, 4), experts=experts, width=width)


def test_r0_without_noise_is_the_slice_and_its_second_layer_is_zero() -> None:
    dense = torch.randn(32, 6).to(torch.bfloat16)
    got = whole(expert_fc1(dense, experts=8, width=8, scale=1.0, draw=QUIET))
    assert torch.equal(got.to(torch.bfloat16), slice_units(dense, experts=8, width=8))
    noisy = Draw(seed=1, name="fc2", units="x", noise=0.5)
    zero = whole(expert_fc2(torch.randn(6, 32), experts=8, width=8, scale=0.0, draw=noisy))
    assert zero.shape == (8, 6, 8)
    assert torch.equal(zero, torch.zeros_like(zero))


def test_noise_has_the_asked_size_and_separates_the_experts() -> None:
    dense = torch.randn(512, 64) * 0.3
    draw = Draw(seed=1, name="n", units="u", noise=0.02)
    got = whole(expert_fc1(dense, experts=16, width=128, scale=1.0, draw=draw))
    change = got - slice_units(dense, experts=16, width=128)
    assert float(change.std()) == pytest.approx(0.02 * float(dense.std()), rel=0.02)
    assert not torch.equal(got[0], got[4])


def test_redrawn_units_are_the_same_in_weight_and_bias_and_the_others_untouched() -> None:
    weight, bias = torch.randn(32, 6) + 3.0, torch.randn(32)
    w_draw = Draw(seed=1, name="w", units="u", drop=0.5)
    b_draw = Draw(seed=1, name="b", units="u", drop=0.5)
    w = whole(expert_fc1(weight, experts=8, width=8, scale=1.0, draw=w_draw))
    b = whole(expert_fc1(bias, experts=8, width=8, scale=1.0, draw=b_draw))
    changed_w = (w != slice_units(weight, experts=8, width=8)).any(dim=-1)
    changed_b = b != slice_units(bias, experts=8, width=8)
    assert changed_w.sum(dim=1).tolist() == [4] * 8
    assert torch.equal(changed_w, changed_b)


def test_redrawn_units_follow_the_dense_moments() -> None:
    dense = torch.randn(512, 256) * 0.2 + 1.0
    draw = Draw(seed=1, name="w", units="u", drop=1.0)
    got = whole(expert_fc1(dense, experts=4, width=128, scale=1.0, draw=draw))
    assert float(got.mean()) == pytest.approx(float(dense.mean()), rel=0.01)
    assert float(got.std()) == pytest.approx(float(dense.std()), rel=0.02)


@pytest.mark.parametrize(("share", "expected"), [(1.0, 1.6 ** (1 / 3)), (0.625, 1.0), (0.0, 0.0)])
def test_the_scale_of_a_routed_share(share: float, expected: float) -> None:
    assert routed_scale(share, top_k=4, routed_scaling=2.5) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([0.25, 0.5, 0.625, 1.0]), st.integers(0, 10_000))
def test_one_whole_group_carries_its_share(share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    width, units, top_k = 8, 32, 4
    w1, b1 = torch.randn(units, 16, generator=generator), torch.randn(units, generator=generator)
    w2, x = torch.randn(16, units, generator=generator), torch.randn(10, 16, generator=generator)
    scale = routed_scale(share, top_k=top_k, routed_scaling=2.5)
    e1 = whole(expert_fc1(w1, experts=8, width=width, scale=scale, draw=QUIET))
    eb = whole(expert_fc1(b1, experts=8, width=width, scale=scale, draw=QUIET))
    e2 = whole(expert_fc2(w2, experts=8, width=width, scale=scale, draw=QUIET))
    want = squared_relu_layer(x, w1, b1, w2)
    for group in (0, 1):
        members = range(group * top_k, (group + 1) * top_k)
        routed = sum((2.5 / top_k) * squared_relu_layer(x, e1[e], eb[e], e2[e]) for e in members)
        total = (1 - share) * want + routed
        assert torch.allclose(total, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_the_scale_of_the_original_tool_is_two_and_a_half_times_too_large() -> None:
    w1, b1, w2, x = torch.randn(32, 16), torch.randn(32), torch.randn(16, 32), torch.randn(10, 16)
    theirs = 4 ** (1 / 3)
    e1 = whole(expert_fc1(w1, experts=4, width=8, scale=theirs, draw=QUIET))
    eb = whole(expert_fc1(b1, experts=4, width=8, scale=theirs, draw=QUIET))
    e2 = whole(expert_fc2(w2, experts=4, width=8, scale=theirs, draw=QUIET))
    routed = sum((2.5 / 4) * squared_relu_layer(x, e1[e], eb[e], e2[e]) for e in range(4))
    want = squared_relu_layer(x, w1, b1, w2)
    assert torch.allclose(routed, 2.5 * want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_router_rows_are_shared_inside_a_virtual_group_only() -> None:
    rows = router_rows(32, 16, std=0.08, share_by=4, seed=1, name="r")
    assert all(torch.equal(rows[4 * g + q], rows[4 * g]) for g in range(8) for q in range(4))
    assert len({tuple(row) for row in rows.tolist()}) == 8
    assert len({tuple(row) for row in router_rows(32, 16, std=0.08, share_by=1, seed=1, name="r").tolist()}) == 32
    with pytest.raises(ShapeMismatch):
        router_rows(30, 16, std=0.08, share_by=4, seed=1, name="r")


def test_removing_a_direction_removes_only_it() -> None:
    rows, direction = torch.randn(32, 16), torch.randn(16) * 5
    got = without_direction(rows, direction)
    assert float((got @ direction).abs().max()) < 1e-4
    basis = torch.linalg.qr(torch.stack([direction, *torch.randn(3, 16)]).T).Q[:, 1:]
    assert torch.allclose(got @ basis, rows @ basis, atol=1e-5)
    assert torch.equal(without_direction(rows, torch.zeros(16)), rows)


def test_removing_the_shared_mean_evens_out_the_load() -> None:
    mean = torch.randn(64) * 3
    x = mean + torch.randn(4000, 64)
    rows = router_rows(32, 64, std=0.08, share_by=1, seed=1, name="r")

    def load(weights: Tensor) -> float:
        return spread(counts((x @ weights.T).topk(4).indices, 32)).relative_entropy

    assert load(rows) < 0.8
    assert load(without_direction(rows, x.mean(dim=0))) > 0.95


def test_the_spread_of_uniform_and_of_collapsed_picks() -> None:
    uniform = spread(torch.ones(64))
    assert uniform.entropy == pytest.approx(math.log(64))
    assert (uniform.relative_entropy, uniform.max_load, uniform.dead) == (pytest.approx(1.0), 1 / 64, 0)
    collapsed = spread(counts(torch.tensor([[0, 1, 2, 3]] * 10), 64))
    assert collapsed.entropy == pytest.approx(math.log(4))
    assert (collapsed.max_load, collapsed.dead) == (0.25, 60)


def test_zero_rows_would_send_every_token_to_the_first_experts() -> None:
    x = torch.randn(100, 16)
    scores = torch.sigmoid(x @ torch.zeros(32, 16).T)
    picks = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :4]
    assert spread(counts(picks, 32)).dead == 28
