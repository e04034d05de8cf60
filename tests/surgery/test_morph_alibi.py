"""What a rotary plane is worth without rotation, and head orders, against slow loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recipes.ops.alibi import (
    mean_distance,
    offset_mass,
    order_by_distance,
    permute_output,
    permute_qkv,
    plane_gains,
    split_gains,
)


def random_pattern(batch: int, heads: int, tokens: int) -> Tensor:
    scores = torch.randn(batch, heads, tokens, tokens)
    return scores.masked_fill(~torch.ones(tokens, tokens, dtype=torch.bool).tril(), -math.inf).softmax(-1)


def test_offset_mass_and_mean_distance_against_a_loop() -> None:
    pattern = random_pattern(2, 3, 7)
    steps = torch.arange(7)
    offset = (steps[:, None] - steps[None, :]).expand(2, 7, 7)
    mass = offset_mass(pattern, offset, offsets=7)
    slow = torch.zeros(3, 7, dtype=torch.float64)
    for b in range(2):
        for h in range(3):
            for i in range(7):
                for j in range(i + 1):
                    slow[h, i - j] += float(pattern[b, h, i, j])
    assert torch.allclose(mass, slow)
    expected = [sum(o * float(slow[h, o]) for o in range(7)) / float(slow[h].sum()) for h in range(3)]
    assert mean_distance(mass).tolist() == pytest.approx(expected)
    assert mean_distance(torch.zeros(2, 4, dtype=torch.float64)).tolist() == [0.0, 0.0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_plane_gain_is_the_best_constant(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(40, generator=generator)
    freq = torch.rand(5, generator=generator)
    gains = plane_gains(mass, freq)
    weight = mass.double() / mass.double().sum()
    turns = torch.cos(freq.double()[:, None] * torch.arange(40))

    def error(gain: Tensor) -> Tensor:
        return ((turns - gain[:, None]).square() * weight).sum(dim=1)

    for step in (-0.01, 0.01):
        assert bool((error(gains) <= error(gains + step)).all())
    assert bool((gains.abs() <= 1 + 1e-12).all())


def test_slow_planes_survive_and_fast_ones_are_damped() -> None:
    freq = torch.exp(-torch.arange(64) / 4 * math.log(1e6) / 16)
    gains = plane_gains(torch.ones(2048), freq)
    assert int((freq * 2048 < 0.5).sum()) == 25
    assert bool((gains[freq * 2048 < 0.5] > 0.95).all())
    assert bool((gains[:16].abs() < 0.05).all())


def test_a_split_multiplies_back_with_its_sign_and_its_floor() -> None:
    gains = torch.tensor([0.81, -0.25, 0.0, 1e-9], dtype=torch.float64)
    query, key = split_gains(gains, floor=0.01)
    assert (query * key).tolist() == pytest.approx([0.81, -0.25, 0.01, 0.01] * 2)
    assert bool((key > 0).all())
    assert query.abs().tolist() == pytest.approx(key.tolist())


def test_heads_are_ordered_by_distance_without_splitting_groups() -> None:
    distance = torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 3.0, 2.0, 1.0])
    assert order_by_distance(distance, groups=2) == (4, 7, 6, 5, 3, 2, 1, 0)
    assert order_by_distance(torch.zeros(8), groups=2) == tuple(range(8))


@settings(deadline=None)
@given(st.permutations(range(2)), st.permutations(range(4)), st.permutations(range(4)))
def test_permuting_heads_consistently_keeps_the_layer(groups: list[int], first: list[int], second: list[int]) -> None:
    inner = {0: first, 1: second}
    order = tuple(group * 4 + head for group in groups for head in inner[group])
    torch.manual_seed(0)
    qkv, o, x = torch.randn(12 * 8, 6), torch.randn(6, 8 * 8), torch.randn(5, 6)
    assert torch.allclose(
        layer(x, qkv, o), layer(x, permuted(qkv, order), permute_output(o, order, head_dim=8)), atol=1e-3
    )


def test_a_permutation_of_q_alone_changes_the_layer() -> None:
    torch.manual_seed(0)
    order = (4, 5, 6, 7, 0, 1, 2, 3)
    qkv, o, x = torch.randn(12 * 8, 6), torch.randn(6, 8 * 8), torch.randn(5, 6)
    assert not torch.allclose(layer(x, qkv, o), layer(x, permuted(qkv, order), o), atol=0.1)


def permuted(qkv: Tensor, order: tuple[int, ...]) -> Tensor:
    return permute_qkv(qkv, order, groups=2, head_dim=8)


def layer(x_TD: Tensor, qkv: Tensor, o: Tensor) -> Tensor:
    """Two KV groups of four query heads of 8, causal, without positions: as slow and plain as it can be written."""
    blocks = (x_TD @ qkv.T).reshape(len(x_TD), 2, 6, 8)
    heads = []
    for head in range(8):
        q, k, v = blocks[:, head // 4, head % 4], blocks[:, head // 4, 4], blocks[:, head // 4, 5]
        scores = (q @ k.T / 8**0.5).masked_fill(~torch.ones(len(x_TD), len(x_TD), dtype=torch.bool).tril(), -math.inf)
        heads.append(scores.softmax(-1) @ v)
    return torch.cat(heads, dim=-1) @ o.T
