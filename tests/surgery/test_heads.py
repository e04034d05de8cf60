"""Merging attention heads: exact where it can be, best where it cannot, and the layout that the model reads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from surgery_pico import split_qkv
from torch import Tensor

from recipes.ops import heads as merging
from recipes.ops.linear import RidgeSums, hadamard, ruled_signs, solve_ridge, symmetric_root, token_weights
from vpstore.errors import ShapeMismatch

WIDTH, HIDDEN = 8, 20


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_there_are_35_partitions_of_eight_heads_and_each_head_is_in_one_half() -> None:
    found = list(merging.partitions(8))
    assert len(found) == len(set(found)) == 35
    assert all(sorted(a + b) == list(range(8)) and 0 in a for a, b in found)
    assert found[0] == ((0, 1, 2, 3), (4, 5, 6, 7))


def test_an_odd_number_of_heads_has_no_partition() -> None:
    with pytest.raises(ShapeMismatch):
        list(merging.partitions(7))


def test_the_best_partition_has_the_smallest_sum_and_the_first_wins_a_tie() -> None:
    losses = dict.fromkeys((half for halves in merging.partitions(4) for half in halves), 1.0)
    assert merging.best_partition(losses, 4) == ((0, 1), (2, 3))
    losses[0, 3] = 0.5
    assert merging.best_partition(losses, 4) == ((0, 3), (1, 2))


@settings(max_examples=30, deadline=None)
@given(groups=st.integers(1, 3), share=st.integers(1, 4), width=st.integers(1, 6), bias=st.booleans())
def test_fusing_and_splitting_are_inverse(groups: int, share: int, width: int, bias: bool) -> None:
    tail = () if bias else (5,)
    q, k, v = noise(groups * share, width, *tail), noise(groups, width, *tail), noise(groups, width, *tail, seed=1)
    fused = merging.fuse_qkv(q, k, v)
    assert fused.shape == ((groups * share + 2 * groups) * width, *tail)
    for found, wanted in zip(split_qkv(fused, queries=groups * share, groups=groups), (q, k, v), strict=True):
        assert torch.equal(found, wanted)


def test_the_layout_is_per_group_and_not_the_plain_order() -> None:
    """T1: [Q0..Q3 K0 V0 | Q4..Q7 K1 V1]; the plain order, read per group, takes queries for keys and values."""
    q, k, v = (torch.arange(n).view(n, 1) + start for n, start in ((8, 0), (2, 10), (2, 20)))
    assert merging.fuse_qkv(q, k, v).tolist() == [0, 1, 2, 3, 10, 20, 4, 5, 6, 7, 11, 21]
    plain = torch.cat([q, k, v]).flatten()
    _, wrong_k, wrong_v = split_qkv(plain, queries=8, groups=2)
    assert wrong_k.tolist() == [[4], [20]]
    assert wrong_v.tolist() == [[5], [21]]


@pytest.mark.parametrize(
    ("shapes"),
    [((7, 4, 3), (2, 4, 3), (2, 4, 3)), ((8, 4, 3), (2, 5, 3), (2, 5, 3)), ((8, 4, 3), (2, 4, 3), (1, 4, 3))],
)
def test_heads_that_do_not_fit_are_not_fused(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ShapeMismatch):
        merging.fuse_qkv(*(noise(*shape) for shape in shapes))


def test_sums_of_output_heads_keep_the_function_of_equal_heads_and_means_halve_it() -> None:
    """T2: two heads that agree contribute (O_1 + O_2) a."""
    output_HN, head_TD = noise(HIDDEN, 4 * WIDTH), noise(5, WIDTH, seed=2)
    donor = torch.cat([head_TD] * 4, 1) @ output_HN.T
    pooled = torch.cat([head_TD] * 2, 1)
    summed = merging.sum_output_heads(output_HN, heads=4, keep=2)
    torch.testing.assert_close(pooled @ summed.T, donor)
    torch.testing.assert_close(pooled @ (summed / 2).T, donor / 2)
    averaged = merging.mean_heads(noise(4 * WIDTH, HIDDEN), heads=4, keep=2)
    slow = torch.stack([noise(4 * WIDTH, HIDDEN).view(4, WIDTH, HIDDEN)[i : i + 2].mean(0) for i in (0, 2)])
    torch.testing.assert_close(averaged, slow)


@pytest.mark.parametrize("merge", [merging.mean_heads, merging.sum_output_heads])
def test_heads_that_do_not_divide_are_refused(merge: object) -> None:
    with pytest.raises(ShapeMismatch):
        merge(noise(12, 12), heads=5, keep=2)  # type: ignore[operator]


def values(rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Projections of four heads with a common row space of `rank`, what reads them, inputs, their covariance."""
    weight_JDH = noise(4, WIDTH, rank) @ noise(rank, HIDDEN, seed=1)
    output_HQD = noise(HIDDEN, 8, WIDTH, seed=2)
    x_TH = noise(400, HIDDEN, seed=3)
    return weight_JDH, output_HQD, x_TH, x_TH.T @ x_TH / len(x_TH)


def test_merged_values_are_exact_when_the_rank_allows() -> None:
    weight_JDH, output_HQD, x_TH, covariance = values(WIDTH)
    merged = merging.merge_values(weight_JDH, merging.value_gains(output_HQD, heads=4), covariance)
    wanted = torch.einsum("jdh,th->tjd", weight_JDH, x_TH)
    got = torch.einsum("jde,eh,th->tjd", merged.decoders_JDD, merged.weight_DH, x_TH)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    assert merged.lost < 1e-10
    energy = (x_TH @ merged.weight_DH.T).square().sum() / (wanted.square().sum() / 4)
    assert float(energy) == pytest.approx(1.0, rel=1e-3)
    assert (merged.weight_DH.norm(dim=1) > 0).all()


def test_a_narrow_input_leaves_no_empty_row() -> None:
    weight_JDH = noise(4, WIDTH, 3)  # hidden size below the head's width
    output_HQD, covariance = noise(3, 8, WIDTH), torch.eye(3, dtype=torch.float64)
    merged = merging.merge_values(weight_JDH, merging.value_gains(output_HQD, heads=4), covariance)
    assert merged.lost < 1e-10
    assert merged.weight_DH.norm(dim=1).min() > 0.1 * merged.weight_DH.norm(dim=1).max()


def test_merged_values_lose_what_the_discarded_eigenvalues_say_and_less_than_a_mean() -> None:
    weight_JDH, output_HQD, x_TH, covariance = values(HIDDEN)
    gains = merging.value_gains(output_HQD, heads=4)
    merged = merging.merge_values(weight_JDH, gains, covariance)
    wanted = torch.einsum("jdh,th->tjd", weight_JDH, x_TH)

    def missed(got_TJD: Tensor) -> float:
        gap = wanted - got_TJD
        return float(
            torch.einsum("tjd,jde,tje->", gap, gains, gap) / torch.einsum("tjd,jde,tje->", wanted, gains, wanted)
        )

    got = torch.einsum("jde,eh,th->tjd", merged.decoders_JDD, merged.weight_DH, x_TH)
    assert missed(got) == pytest.approx(merged.lost, rel=1e-6)
    assert missed(wanted.mean(1, keepdim=True).expand_as(wanted)) > 1.5 * merged.lost
    factors = merging.value_factors(weight_JDH, gains, covariance)
    whole = float(factors.square().sum())
    assert merging.value_loss(factors, (0, 1, 2, 3), keep=WIDTH) / whole == pytest.approx(merged.lost, rel=1e-6)


def keys(seed: int, *, heads: int = 4, tokens: int = 300) -> Tensor:
    return torch.complex(noise(tokens, heads, WIDTH // 2, seed=seed), noise(tokens, heads, WIDTH // 2, seed=seed + 1))


def moments(z_TJP: Tensor) -> Tensor:
    return torch.einsum("tjp,tkp->pjk", z_TJP, z_TJP.conj())


def test_planes_are_half_split_pairs() -> None:
    assert merging.to_planes(torch.tensor([1.0, 2, 3, 4])).tolist() == [1 + 3j, 2 + 4j]
    x = noise(3, WIDTH)
    assert torch.equal(merging.from_planes(merging.to_planes(x)), x)


def test_heads_that_agree_up_to_a_complex_factor_merge_exactly() -> None:
    common_TP = keys(0, heads=1)[:, 0]
    factors_JP = torch.complex(noise(4, WIDTH // 2, seed=5), noise(4, WIDTH // 2, seed=6))
    z_TJP = common_TP[:, None] * factors_JP
    merged = merging.merge_keys(moments(z_TJP), noise(4, WIDTH // 2, seed=7).abs() + 0.1, (0, 1, 2, 3))
    assert merged.lost < 1e-10
    key_TP = torch.einsum("tjp,jp->tp", z_TJP, merged.encode_JP)
    torch.testing.assert_close(key_TP[:, None] * merged.decode_JP, z_TJP)
    q_TJP, turn_P = keys(8), torch.polar(torch.ones(WIDTH // 2, dtype=torch.float64), noise(WIDTH // 2, seed=9))
    wanted = (q_TJP * z_TJP.conj() * turn_P).real.sum(2)  # scores at some distance
    got = (q_TJP * merged.decode_JP.conj() * key_TP.conj()[:, None] * turn_P).real.sum(2)
    torch.testing.assert_close(got, wanted)


def test_equal_heads_merge_to_themselves() -> None:
    z_TJP = keys(0, heads=1).expand(-1, 4, -1)
    merged = merging.merge_keys(moments(z_TJP), torch.ones(4, WIDTH // 2), (0, 1, 2, 3))
    torch.testing.assert_close(torch.einsum("tjp,jp->tp", z_TJP, merged.encode_JP), z_TJP[:, 0])


def test_no_complex_factors_lose_less_than_the_merged_keys() -> None:
    z_TJP, energy_JP = keys(0), noise(4, WIDTH // 2, seed=4).abs() + 0.1
    merged = merging.merge_keys(moments(z_TJP), energy_JP, (0, 1, 2, 3))

    def missed(encode_JP: Tensor, decode_JP: Tensor) -> float:
        key_TP = torch.einsum("tjp,jp->tp", z_TJP, encode_JP)
        gap = (z_TJP - key_TP[:, None] * decode_JP).abs().square() * energy_JP
        return float(gap.sum() / (z_TJP.abs().square() * energy_JP).sum())

    best = missed(merged.encode_JP, merged.decode_JP)
    assert best == pytest.approx(merged.lost, rel=1e-6)
    for seed in range(20):
        other = torch.complex(noise(4, WIDTH // 2, seed=seed), noise(4, WIDTH // 2, seed=seed + 50)) * 0.1
        assert missed(merged.encode_JP + other, merged.decode_JP) >= best
        assert missed(merged.encode_JP, merged.decode_JP + other) >= best


def test_a_group_is_judged_by_its_own_heads_only() -> None:
    z_TJP = torch.cat([keys(0, heads=1).expand(-1, 2, -1), keys(20, heads=1).expand(-1, 2, -1)], 1)
    energy, moment = torch.ones(4, WIDTH // 2), moments(z_TJP)
    assert merging.key_loss(moment, energy, (0, 1)) < 1e-9 < 0.1 < merging.key_loss(moment, energy, (0, 2))


def test_ridge_sums_equal_one_least_squares_and_never_lose_to_another_map() -> None:
    x, y = noise(200, 6), noise(200, 3, seed=1) + noise(200, 6) @ noise(6, 3, seed=2)
    weight_T = noise(200, seed=3).abs()
    sums = RidgeSums(6, 3)
    for start in range(0, 200, 70):
        sums.add(x[start : start + 70], y[start : start + 70], weight_T[start : start + 70])
    weight, bias = sums.solve(ridge=1e-12)
    root_T1 = weight_T.sqrt()[:, None]
    slow = torch.linalg.lstsq(torch.cat([x, torch.ones(200, 1)], 1) * root_T1, y * root_T1).solution
    torch.testing.assert_close(weight, slow[:-1].T, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(bias, slow[-1], rtol=1e-6, atol=1e-8)
    best = sums.explained(weight, bias)
    error = ((y - x @ weight.T - bias).square().sum(1) * weight_T).sum()
    mean = (y * weight_T[:, None]).sum(0) / weight_T.sum()
    assert best == pytest.approx(float(1 - error / ((y - mean).square().sum(1) * weight_T).sum()))
    for seed in range(10):
        assert sums.explained(weight + 0.1 * noise(3, 6, seed=seed), bias) < best


def test_a_fit_without_inputs_gives_the_mean() -> None:
    sums = RidgeSums(2, 1)
    sums.add(torch.zeros(4, 2), torch.tensor([[1.0], [2], [3], [6]]))
    weight, bias = sums.solve(ridge=1e-3)
    assert weight.tolist() == [[0.0, 0.0]]
    assert bias.tolist() == [3.0]


def test_what_does_not_fit_a_fit_is_refused() -> None:
    with pytest.raises(ShapeMismatch):
        RidgeSums(2, 1).add(noise(3, 2), noise(4, 1))
    with pytest.raises(ShapeMismatch):
        solve_ridge(noise(3, 2), noise(3, 1), ridge=0.1)
    with pytest.raises(ShapeMismatch):
        hadamard(12)


def test_small_matrix_tools() -> None:
    turn = hadamard(16)
    torch.testing.assert_close(turn @ turn.T, torch.eye(16, dtype=torch.float64))
    half = noise(6, 4)
    root, inverse = symmetric_root(half @ half.T)
    torch.testing.assert_close(root @ root, half @ half.T)
    torch.testing.assert_close(root @ inverse @ root, root, rtol=1e-6, atol=1e-6)
    vectors = ruled_signs(torch.tensor([[1.0, -3.0], [-2.0, 3.0]]))
    assert vectors.tolist() == [[-1.0, 3.0], [2.0, -3.0]]


def test_a_token_with_too_much_energy_counts_as_if_it_had_less() -> None:
    y = torch.ones(9, 2)
    y[4] *= 100
    weights = token_weights(y, limit=10.0)
    assert weights[4] == pytest.approx(10 * 2 / 20_000)
    assert (weights[[0, 8]] == 1).all()
