"""TPA factors from linear maps: exact keys, the best subspace of queries, alternating least squares."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recipes.ops.tpa import (
    Factors,
    compose,
    constant_direction,
    constant_factors,
    direction_weights,
    fitted_factors,
    low_rank_factors,
    principal_heads,
    stored,
    sweep,
)

WIDTH, HEAD = 24, 16
RIDGE = 1e-9


def inputs(tokens: int = 600, *, mean: float = 1.0, seed: int = 0) -> Tensor:
    """Unit-RMS rows with a shared mean component, as a norm leaves them."""
    generator = torch.Generator().manual_seed(seed)
    x = mean + torch.randn(tokens, WIDTH, generator=generator) * torch.linspace(0.2, 1.5, WIDTH)
    return x / x.square().mean(dim=1, keepdim=True).sqrt()


def maps(heads: int, *, seed: int = 1) -> Tensor:
    return torch.randn(heads, HEAD, WIDTH, generator=torch.Generator().manual_seed(seed)) / WIDTH**0.5


def weighted_error(factors: Factors, x: Tensor, target: Tensor, weight: Tensor) -> float:
    """Mean over tokens and heads of weight * |target - composed|^2."""
    left = target.double() - compose(factors, x)
    return float((left.square().sum(dim=2) * weight).mean())


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


def heads_of(x_TD: Tensor, heads_NdD: Tensor) -> Tensor:
    return torch.einsum("tj,ndj->tnd", x_TD.double(), heads_NdD.double())


def test_composition_against_a_loop() -> None:
    torch.manual_seed(0)
    factors = Factors(torch.randn(3, 2, 5).double(), torch.randn(2, 4, 5).double(), torch.randn(3, 4).double())
    x = torch.randn(6, 5)
    a, b, bias = stored(factors)
    for t in range(6):
        for n in range(3):
            for d in range(4):
                total = sum(float(a[n * 2 + r] @ x[t]) * float(b[r * 4 + d] @ x[t]) for r in range(2)) / 2
                assert float(compose(factors, x)[t, n, d]) == pytest.approx(total + float(bias[n * 4 + d]), abs=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_the_constant_direction_is_the_least_squares_one(seed: int) -> None:
    x = inputs(seed=seed).double()
    w = constant_direction(x, ridge=RIDGE)
    base = (1 - x @ w).square().mean()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        other = w + 1e-3 * torch.randn(WIDTH, generator=generator).double()
        assert float((1 - x @ other).square().mean()) >= float(base) - 1e-12


def test_keys_are_exact_behind_their_norm() -> None:
    x, heads = inputs(mean=2.0), maps(2)
    w = constant_direction(x, ridge=RIDGE)
    assert float((x.double() @ w).min()) > 0
    a, b, bias = stored(constant_factors(w, heads, torch.zeros(2, HEAD)))
    composed = torch.matmul((x @ a.T).unflatten(-1, (2, 2)), (x @ b.T).unflatten(-1, (2, HEAD))) / 2
    assert float((rms(composed + bias.reshape(2, HEAD)) - rms(heads_of(x, heads).float())).abs().max()) < 1e-4


def test_a_key_with_a_bias_is_off_to_second_order_only() -> None:
    x, heads = inputs(mean=2.0), maps(2)
    bias = torch.randn(2, HEAD, generator=torch.Generator().manual_seed(3)) * 0.5
    w = constant_direction(x, ridge=RIDGE)
    want = rms(heads_of(x, heads) + bias.double())
    c = (x.double() @ w)[:, None, None]
    mine = rms(compose(constant_factors(w, heads, bias), x)) - want
    beside = rms(c * heads_of(x, heads) + bias.double()) - want
    folded = rms(c * heads_of(x, heads) + c * c * bias.double()) - want
    assert float(mine.square().mean()) < 0.1 * float(beside.square().mean())
    assert float(mine.square().mean()) < 0.1 * float(folded.square().mean())


def test_a_wrong_sign_of_the_constant_turns_the_key_round() -> None:
    # Negative control: what the report's smallest c guards against.
    x, heads = inputs(mean=2.0), maps(2)
    w = constant_direction(x, ridge=RIDGE)
    got = rms(compose(constant_factors(-w, heads, torch.zeros(2, HEAD)), x))
    assert torch.allclose(got, -rms(heads_of(x, heads)), atol=1e-4)


def test_fitted_values_beat_the_copied_map_and_keep_the_mean() -> None:
    x, heads = inputs(mean=1.0), maps(2)
    target = heads_of(x, heads)
    w = constant_direction(x, ridge=RIDGE)
    fitted = fitted_factors(w, x, target, start_NdD=heads, ridge=RIDGE)
    copied = constant_factors(w, heads, torch.zeros(2, HEAD))
    ones = torch.ones(len(x), 2).double()
    assert weighted_error(fitted, x, target, ones) < weighted_error(copied, x, target, ones)
    assert torch.allclose(compose(fitted, x).mean(dim=0), target.mean(dim=0), atol=1e-9)


def test_a_strong_ridge_returns_the_start() -> None:
    x, heads = inputs(mean=1.0), maps(2)
    w = constant_direction(x, ridge=RIDGE)
    fitted = fitted_factors(w, x, heads_of(x, heads), start_NdD=heads, ridge=1e9)
    assert torch.allclose(fitted.b_RdD, heads.double(), atol=1e-6)


def test_a_constant_input_feature_makes_low_rank_heads_exact() -> None:
    x = inputs(mean=1.0).double()
    x[:, 0] = 1.0
    basis, mix = maps(4), torch.randn(8, 4, generator=torch.Generator().manual_seed(5))
    heads = torch.einsum("nr,rdj->ndj", mix, basis)
    target = heads_of(x, heads)
    w = constant_direction(x, ridge=RIDGE)
    factors = low_rank_factors(w, x, target, start_NdD=heads, rank=4, ridge=RIDGE)
    assert float((compose(factors, x) - target).abs().max()) < 1e-5


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000))
def test_the_subspace_beats_random_ones(seed: int) -> None:
    x, heads = inputs(mean=1.0, seed=seed), maps(8, seed=seed + 1)
    target = heads_of(x, heads)
    w = constant_direction(x, ridge=RIDGE)
    best = low_rank_factors(w, x, target, start_NdD=heads, rank=4, ridge=RIDGE)
    weight = (1.0 / target.square().sum(dim=2).mean(dim=0)).expand(len(x), 8)
    error = weighted_error(best, x, target, weight)
    features = x.double() * (x.double() @ w)[:, None]
    generator = torch.Generator().manual_seed(seed)
    scale = target.square().sum(dim=2).mean(dim=0).sqrt()
    for _ in range(5):
        basis = torch.linalg.qr(torch.randn(8, 4, generator=generator).double()).Q
        wide = torch.einsum("nr,tnd->trd", basis, (target - target.mean(dim=0)) / scale[:, None]).flatten(1)
        centred = features - features.mean(dim=0)
        fit = torch.linalg.lstsq(centred, wide).solution
        rebuilt = torch.einsum("nr,trd->tnd", basis, (centred @ fit).unflatten(1, (4, HEAD))) * scale[:, None]
        left = target - target.mean(dim=0) - rebuilt
        assert error <= float((left.square().sum(dim=2) * weight).mean()) * (1 + 1e-9)


def test_principal_heads_are_orthonormal_and_signed() -> None:
    root = torch.randn(8, 8, generator=torch.Generator().manual_seed(2)).double()
    vectors = principal_heads(root @ root.T, 4)
    assert torch.allclose(vectors.T @ vectors, torch.eye(4).double(), atol=1e-9)
    assert bool((vectors.gather(0, vectors.abs().argmax(dim=0)[None]) > 0).all())
    energies = [float(v @ (root @ root.T) @ v) for v in vectors.T]
    assert energies == sorted(energies, reverse=True)


def test_direction_weights_ignore_the_size() -> None:
    target = torch.randn(5, 3, 4)
    target[0, 0] = 0
    weights = direction_weights(target)
    assert float(weights[0, 0]) == 0.0
    assert float(weights[1, 1]) == pytest.approx(1 / float(target[1, 1].square().sum()), rel=1e-5)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000))
def test_a_sweep_never_raises_the_error(seed: int) -> None:
    x, heads = inputs(300, mean=0.7, seed=seed), maps(8, seed=seed + 1)
    target = heads_of(x, heads)
    weight = direction_weights(target)
    w = constant_direction(x, ridge=RIDGE)
    factors = low_rank_factors(w, x, target, start_NdD=heads, rank=4, ridge=RIDGE)
    errors = [weighted_error(factors, x, target, weight)]
    for _ in range(3):
        factors = sweep(factors, x, target, weight, ridge=1e-4)
        errors.append(weighted_error(factors, x, target, weight))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_a_sweep_solves_both_systems_exactly() -> None:
    # With A fixed and no ridge, B and the bias are the least-squares solution of the stacked, weighted problem.
    x, heads = inputs(80, mean=0.7), maps(2)[:, :3]
    target = heads_of(x, heads)
    weight = direction_weights(target)
    start = constant_factors(constant_direction(x, ridge=RIDGE), heads, torch.zeros(2, 3))
    got = sweep(start, x, target, weight, ridge=1e-12)
    rows, wants = [], []
    a = torch.einsum("tj,nrj->tnr", x.double(), start.a_NRD)
    for t in range(len(x)):
        for n in range(2):
            features = torch.cat([a[t, n, r] * x[t].double() for r in range(2)] + [torch.eye(2).double()[n]])
            rows.append(features * weight[t, n].sqrt())
            wants.append(target[t, n] * weight[t, n].sqrt())
    solved = torch.linalg.lstsq(torch.stack(rows), torch.stack(wants), driver="gelsd").solution
    halfway = Factors(start.a_NRD, solved[: 2 * WIDTH].reshape(2, WIDTH, 3).transpose(1, 2), solved[2 * WIDTH :])
    final = weighted_error(got, x, target, weight)
    assert final <= weighted_error(halfway, x, target, weight) * (1 + 1e-6) + 1e-12
