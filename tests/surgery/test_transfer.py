from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipes.ops.transfer import combine, held_out_positions, measure_gain


def _rows(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def test_combine_equals_a_loop() -> None:
    atoms, mean = _rows(9, 1), _rows(1, 2)[0]
    support = torch.tensor([[0, 8, 3], [5, -1, -1]])
    weight = torch.tensor([[0.5, -2.0, 1.0], [3.0, 0.0, 0.0]])
    found = combine(support, weight, atoms - mean, mean, gain=0.3)
    for row in range(2):
        expected = mean.clone()
        for k in range(3):
            if support[row, k] >= 0:
                expected += 0.3 * weight[row, k] * (atoms[support[row, k]] - mean)
        torch.testing.assert_close(found[row], expected)


def test_plain_transfer_is_the_bare_sum() -> None:
    atoms = _rows(4, 3)
    found = combine(torch.tensor([[1, 2]]), torch.tensor([[2.0, -1.0]]), atoms, torch.zeros(6), gain=1.0)
    torch.testing.assert_close(found[0], 2 * atoms[1] - atoms[2])


def test_common_part_is_kept_whatever_the_coefficients_sum_to() -> None:
    """The fault of plain transfer: rows of large common part get a share of it that depends on the sum alone."""
    common = torch.full((6,), 100.0)
    atoms = common + _rows(4, 4)
    support, weight = torch.tensor([[0, 1]]), torch.tensor([[0.2, 0.1]])
    calibrated = combine(support, weight, atoms - common, common, gain=1.0)
    plain = combine(support, weight, atoms, torch.zeros(6), gain=1.0)
    assert (calibrated - common).abs().max() < 2
    assert (plain - common).abs().min() > 60


@given(st.floats(0.01, 3.0), st.integers(0, 1000))
def test_gain_is_the_least_squares_slope(slope: float, seed: int) -> None:
    mean, predicted = _rows(1, seed)[0], _rows(40, seed + 1)
    true = mean + slope * (predicted - mean)
    gain = measure_gain(predicted, true, mean)
    assert gain.slope == pytest.approx(slope, rel=1e-4)
    assert gain.r_squared == pytest.approx(1.0, abs=1e-6)


def test_unrelated_and_opposite_predictions_fall_back_to_the_mean() -> None:
    mean, predicted = torch.zeros(6), _rows(4000, 7)
    assert abs(measure_gain(predicted, _rows(4000, 8), mean).slope) < 0.05
    assert measure_gain(predicted, -predicted, mean).slope == 0.0
    assert measure_gain(torch.zeros(3, 6), _rows(3, 9), mean).slope == 0.0


@given(st.integers(0, 300), st.integers(0, 300))
def test_held_out_positions_are_distinct_and_leave_half(count: int, wanted: int) -> None:
    found = held_out_positions(count, wanted)
    assert len(set(found)) == len(found) == min(wanted, count // 2)
    assert all(0 <= place < count for place in found)
