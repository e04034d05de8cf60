"""Frequencies, rotation and slopes against the formulas, and float32 where it is promised."""

import math

import numpy as np
import pytest
import torch
from student_reference import rotated

from recipes.model.grape import GrapeM, alibi_slopes, initial_log_freq, rope_frequencies, rotary_tables, rotate


def test_frequencies_start_at_ropes_for_base_one_million():
    module = GrapeM(128, base=1e6)
    for i, (log_freq, frequency) in enumerate(
        zip(module.log_freq.tolist(), module.frequencies().tolist(), strict=True)
    ):
        assert log_freq == pytest.approx(-(i / 4) * math.log(1e6), rel=1e-6)
        assert frequency == pytest.approx(1e6 ** (-2 * i / 128), rel=3e-6)
    torch.testing.assert_close(module.frequencies(), rope_frequencies(128, base=1e6), rtol=3e-6, atol=0)


def test_the_forks_default_base_is_another_spectrum():
    ratio = rope_frequencies(128, base=1e4) / rope_frequencies(128, base=1e6)
    assert float(ratio[-1]) > 90


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half()])
def test_log_freq_stays_float32_under_casts(cast):
    module = GrapeM(128, base=1e6)
    module.frequencies().sum().backward()
    before, gradient = module.log_freq.detach().clone(), module.log_freq.grad.clone()
    cast(module)
    assert module.log_freq.dtype == torch.float32
    assert torch.equal(module.log_freq, before)
    assert module.log_freq.grad is not None
    assert torch.equal(module.log_freq.grad, gradient)


def test_what_a_bfloat16_log_freq_would_have_cost():
    exact = initial_log_freq(128, base=1e6)
    rounded = torch.exp(exact.to(torch.bfloat16).float() / 16)
    error = (rounded / torch.exp(exact / 16) - 1).abs()
    phase = (rounded - torch.exp(exact / 16)).abs() * 2047
    assert 0.02 < float(error.max()) < 0.04
    assert float(phase.max()) > 1.0


def test_log_freq_may_become_wider():
    assert GrapeM(128, base=1e6).double().log_freq.dtype == torch.float64


def test_gradient_is_a_sixteenth_of_the_frequencys():
    module = GrapeM(128, base=1e6).double()
    weight = torch.linspace(-1, 1, 64, dtype=torch.float64)
    (module.frequencies() * weight).sum().backward()
    torch.testing.assert_close(module.log_freq.grad, module.frequencies().detach() / 16 * weight)


def test_rotation_is_the_loop_over_planes():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 3, 128, generator=generator, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 0, 1, 2, 0, 2000]])
    frequency = rope_frequencies(128, base=1e6, dtype=torch.float64)
    turned = rotate(x, rotary_tables(positions, frequency))
    for b in range(2):
        for t in range(7):
            for h in range(3):
                expected = rotated(x[b, t, h].numpy(), int(positions[b, t]), frequency.numpy())
                np.testing.assert_allclose(turned[b, t, h].numpy(), expected, rtol=0, atol=1e-12)


def test_neighbouring_pairs_are_another_rotation():
    x = torch.randn(1, 5, 1, 128, generator=torch.Generator().manual_seed(0))
    tables = rotary_tables(torch.arange(5)[None], rope_frequencies(128, base=1e6))
    interleaved = x.unflatten(-1, (64, 2)).transpose(-1, -2).flatten(-2)
    other = rotate(interleaved, tables).unflatten(-1, (2, 64)).transpose(-1, -2).flatten(-2)
    assert float((rotate(x, tables) - other).abs().max()) > 0.1


def test_bfloat16_inputs_are_turned_in_float32():
    x = torch.randn(1, 9, 2, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    tables = rotary_tables(torch.arange(9)[None], rope_frequencies(128, base=1e6))
    assert torch.equal(rotate(x, tables), rotate(x.float(), tables).to(torch.bfloat16))


def test_slopes():
    assert alibi_slopes(8).tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
