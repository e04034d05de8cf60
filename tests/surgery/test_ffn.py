"""From the gated feed-forward to the ungated one: the pair identity, the choice of neurons, the fit."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recipes.model.config import DonorConfig
from recipes.model.convert_ffn import Examples, FfnSetting, features, fit_ffn, pool_ffn
from recipes.model.donor import DonorMlp
from recipes.ops import ffn
from vpstore.errors import ShapeMismatch


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=100, deadline=None)
@given(g=st.floats(-3, 3), u=st.floats(-3, 3), s=st.floats(0.05, 2))
def test_the_pair_identity(g: float, u: float, s: float) -> None:
    gate, up = (torch.tensor([[x]], dtype=torch.float64) for x in (g, u))
    value = float(ffn.pair_features(gate, up, torch.tensor([s], dtype=torch.float64)))
    if abs(s * u) <= g:
        assert value == pytest.approx(g * u, abs=1e-9)
    if abs(s * u) <= -g:
        assert value == 0.0
    assert value * u >= 0


def test_rows_and_columns_of_pairs_give_their_features() -> None:
    x, gate, up, down = noise(50, 6), noise(4, 6, seed=1), noise(4, 6, seed=2), noise(6, 4, seed=3)
    scale = noise(4, seed=4).abs() + 0.1
    inner = ffn.relu_squared(x @ ffn.pair_rows(gate, up, scale).T)
    wanted = ffn.pair_features(x @ gate.T, x @ up.T, scale) @ down.T
    column = down / (4 * scale)
    torch.testing.assert_close(inner @ torch.cat([column, -column], dim=1).T, wanted)


def slow_selection(features_TN: Tensor, y_TH: Tensor, count: int) -> list[int]:
    """Least squares of every candidate set, from scratch."""
    chosen: list[int] = []
    centred, target = features_TN - features_TN.mean(0), y_TH - y_TH.mean(0)
    for _ in range(count):
        errors = []
        for candidate in range(features_TN.shape[1]):
            if candidate in chosen:
                errors.append(float("inf"))
                continue
            used = centred[:, [*chosen, candidate]]
            errors.append(float((target - used @ torch.linalg.lstsq(used, target).solution).square().sum()))
        chosen.append(errors.index(min(errors)))
    return chosen


def moments(features_TN: Tensor, y_TH: Tensor) -> tuple[Tensor, Tensor]:
    centred = features_TN - features_TN.mean(0)
    return centred.T @ centred / len(centred), centred.T @ (y_TH - y_TH.mean(0)) / len(centred)


@pytest.mark.parametrize("seed", range(5))
def test_the_greedy_choice_equals_a_slow_one(seed: int) -> None:
    features_TN = noise(80, 12, seed=seed) @ (torch.eye(12, dtype=torch.float64) + 0.5 * noise(12, 12, seed=seed + 50))
    y = features_TN @ noise(12, 3, seed=seed + 100)
    assert ffn.select_greedily(*moments(features_TN, y), 6) == slow_selection(features_TN, y, 6)


def test_equal_and_empty_features_are_chosen_once_and_last() -> None:
    base = noise(60, 3)
    features_TN = torch.cat([base[:, :1], base[:, :1], torch.zeros(60, 1), base[:, 1:]], 1)
    y = base @ torch.tensor([[3.0], [2.0], [1.0]], dtype=torch.float64)
    chosen = ffn.select_greedily(*moments(features_TN, y), 5)
    assert chosen[:3] == [0, 3, 4]
    assert sorted(chosen) == [0, 1, 2, 3, 4]


def test_greedy_beats_the_heaviest_rows_when_heavy_rows_are_redundant() -> None:
    features_TN = noise(200, 8)
    features_TN[:, 1:4] = features_TN[:, :1] + 0.01 * features_TN[:, 1:4]
    down = torch.tensor([5.0, 5, 5, 5, 1, 1, 1, 1], dtype=torch.float64)[:, None] * torch.eye(8, dtype=torch.float64)
    y = features_TN @ down

    def error(chosen: list[int]) -> float:
        used = features_TN[:, chosen]
        return float((y - used @ torch.linalg.lstsq(used, y).solution).square().sum())

    greedy = ffn.select_greedily(*moments(features_TN, y), 4)
    assert error(greedy) < error(ffn.select_by_norm(torch.eye(8, dtype=torch.float64), down.T, 4))
    best = min(error(list(chosen)) for chosen in combinations(range(8), 4))
    assert error(greedy) <= 1.5 * best


@pytest.mark.parametrize("count", [-1, 5])
def test_more_features_than_there_are_cannot_be_chosen(count: int) -> None:
    with pytest.raises(ShapeMismatch):
        ffn.select_greedily(torch.eye(4), torch.ones(4, 1), count)


def test_pairs_of_unequal_length_are_refused() -> None:
    with pytest.raises(ShapeMismatch):
        ffn.pair_rows(noise(4, 6), noise(3, 6), noise(4))


HIDDEN, INNER, WIDTH = 24, 72, 16


def setting(**changes: object) -> FfnSetting:
    fields = {"width": WIDTH, "ridge": 1e-4, "pair_scale": 0.5, "steps": 0, "step_tokens": 256}
    return FfnSetting(**{**fields, "learning_rate": 0.01, "seed": 0, **changes})  # type: ignore[arg-type]


def teacher() -> tuple[DonorMlp, Examples, Examples]:
    """A gated teacher on anisotropic inputs, with tokens to fit and tokens held out."""
    mlp = DonorMlp(DonorConfig(hidden_size=HIDDEN, num_hidden_layers=1, intermediate_size=INNER)).requires_grad_(False)
    for number, weight in enumerate(mlp.parameters()):
        weight.copy_(noise(*weight.shape, seed=number) * weight.shape[1] ** -0.5)
    spread = torch.linspace(2.0, 0.3, HIDDEN).double()
    x = (noise(3000, HIDDEN, seed=9) * spread + 0.3).float()
    both = [Examples.of(part, mlp(part), limit=30.0) for part in (x[:2400], x[2400:])]
    return mlp, both[0], both[1]


def r2(tensors: dict[str, Tensor], held_out: Examples) -> float:
    inner = features(tensors["fc1.weight"], tensors["fc1.bias"], held_out.inputs_TH)
    got = F.linear(inner, tensors["fc2.weight"].float(), tensors["fc2.bias"].float())
    gap, spread = got - held_out.targets_TH, held_out.targets_TH - held_out.targets_TH.mean(0)
    return float(1 - gap.square().sum() / spread.square().sum())


def test_fitted_pairs_beat_selected_up_rows_and_zero_on_held_out_tokens() -> None:
    """T4: keeping `up` rows without the gate is worse than no feed-forward at all."""
    mlp, seen, held_out = teacher()
    pairs, figures = fit_ffn(mlp, seen, setting())
    stepped, more = fit_ffn(mlp, seen, setting(steps=150))
    assert r2(pool_ffn(mlp, width=WIDTH), held_out) < 0
    assert 0.3 < r2(pairs, held_out) < r2(stepped, held_out)
    assert more["r2"] > more["r2_pairs"] == figures["r2"]
    assert {name: (value.dtype, tuple(value.shape)) for name, value in pairs.items()} == {
        "fc1.weight": (torch.bfloat16, (WIDTH, HIDDEN)),
        "fc1.bias": (torch.bfloat16, (WIDTH,)),
        "fc2.weight": (torch.bfloat16, (HIDDEN, WIDTH)),
        "fc2.bias": (torch.bfloat16, (HIDDEN,)),
    }


def test_the_fit_is_the_same_twice() -> None:
    mlp, seen, _ = teacher()
    first, second = (fit_ffn(mlp, seen, setting(steps=20))[0] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("width", [15, 2 * INNER + 2])
def test_a_width_that_holds_no_pairs_is_refused(width: int) -> None:
    mlp, seen, _ = teacher()
    with pytest.raises(ShapeMismatch):
        fit_ffn(mlp, seen, setting(width=width))
