"""Differences that gates hold, and offsets that stand in for lost mass."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recipes.ops.compare import Distance
from recipes.ops.sink import kept_mass, match_kept_mass


def apart(before: list[Tensor], after: list[Tensor]) -> Distance:
    found = Distance()
    for pair in zip(before, after, strict=True):
        found.add(*pair)
    return found


def test_differences_against_plain_arithmetic() -> None:
    before, after = (
        [torch.tensor([3.0, 4.0]), torch.tensor([[0.0]])],
        [torch.tensor([3.0, 4.5]), torch.tensor([[0.25]])],
    )
    assert apart(before, after).largest == 0.5
    assert apart(before, after).relative == pytest.approx((0.25 + 0.0625) ** 0.5 / 5)
    assert apart(before, before).relative == 0.0


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_nothing_that_is_not_finite_hides_behind_a_maximum(poison: float) -> None:
    good, bad = torch.zeros(3), torch.tensor([0.0, poison, 0.0])
    for pair in (([good, good], [good, bad]), ([good, good], [bad, good]), ([bad, good], [bad, good])):
        assert apart(*pair).largest == sys.float_info.max
        assert apart(*pair).relative == sys.float_info.max


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 0.95))
def test_the_offset_keeps_the_mass_that_was_asked_for(seed: int, target: float) -> None:
    lse = torch.randn(50, 3, generator=torch.Generator().manual_seed(seed)) * 2
    offset = match_kept_mass(lse, torch.full((3,), target, dtype=torch.float64), at_least_Q=torch.full((3,), -40.0))
    assert kept_mass(lse, lse, offset).tolist() == pytest.approx([target] * 3, abs=1e-9)


def test_kept_mass_against_a_loop() -> None:
    scores = torch.randn(6, 5)
    seen, offset = scores[:, :3], torch.tensor([0.3])
    shares = [
        float(seen[t].exp().sum()) / (float(scores[t].exp().sum()) + float(offset.exp())) for t in range(len(scores))
    ]
    got = kept_mass(seen.logsumexp(1)[:, None], scores.logsumexp(1)[:, None], offset)
    assert float(got) == pytest.approx(sum(shares) / len(shares), rel=1e-6)


def test_an_offset_is_never_lowered() -> None:
    lse, before = torch.zeros(10, 1), torch.tensor([-4.0])
    assert float(match_kept_mass(lse, torch.tensor([1.0]), at_least_Q=before)) == -4.0
    assert float(match_kept_mass(lse, torch.tensor([0.9999]), at_least_Q=before)) == -4.0
    assert float(match_kept_mass(lse, torch.tensor([0.5]), at_least_Q=before)) == pytest.approx(0.0, abs=1e-9)
