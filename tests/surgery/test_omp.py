"""Orthogonal matching pursuit: the fast solver chooses exactly what a slow float64 loop chooses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recipes.ops import omp
from recipes.ops.omp import Dictionary
from vpstore.errors import ShapeMismatch


def slow_omp(atoms_ND: Tensor, target_D: Tensor, atoms: int) -> tuple[list[int], Tensor]:
    """The definition: best inner product, then least squares on the support, all in float64."""
    wide_ND, y_D = atoms_ND.float().double(), target_D.float().double()
    support: list[int] = []
    weights, residual_D = torch.zeros(0, dtype=torch.float64), y_D
    for _ in range(atoms):
        score_N = torch.stack([(row * residual_D).sum().abs() for row in wide_ND])
        score_N[support] = -1
        best = int(score_N.argmax())
        reach = 1e-6 * wide_ND.norm(dim=1).max() * residual_D.norm()
        if residual_D.norm() <= 1e-6 * y_D.norm() or score_N[best] <= reach:
            break
        support.append(best)
        weights = torch.linalg.lstsq(wide_ND[support].T, y_D[:, None]).solution[:, 0]
        residual_D = y_D - weights @ wide_ND[support]
    return support, weights


def cloud(rows: int, width: int, seed: int, spread: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator) * (1 + spread * torch.rand(rows, 1, generator=generator))


def check_against_slow(atoms_ND: Tensor, targets_BD: Tensor, count: int, **options: Any) -> None:
    found = Dictionary(atoms_ND, **options).solve(targets_BD, atoms=count)
    for row, target_D in enumerate(targets_BD):
        support, weights = slow_omp(atoms_ND, target_D, count)
        chosen = found.support_BK[row]
        assert chosen[: len(support)].tolist() == support
        assert (chosen[len(support) :] == -1).all()
        assert (found.coefficients_BK[row, len(support) :] == 0).all()
        torch.testing.assert_close(found.coefficients_BK[row, : len(support)], weights, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("use_gram", [True, False])
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(4, 300),
    width=st.integers(2, 24),
    count=st.integers(1, 12),
    seed=st.integers(0, 10_000),
)
def test_equals_the_definition(use_gram: bool, rows: int, width: int, count: int, seed: int) -> None:
    check_against_slow(cloud(rows, width, seed), cloud(3, width, seed + 1), min(count, rows), use_gram=use_gram)


@pytest.mark.parametrize("use_gram", [True, False])
def test_a_screen_of_bfloat16_precision_still_gives_the_exact_support(
    use_gram: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    atoms_ND, targets_BD = cloud(700, 32, 3), cloud(40, 32, 4)
    exact = Dictionary(atoms_ND, use_gram=use_gram).solve(targets_BD, atoms=8)
    coarse = Dictionary(atoms_ND, use_gram=False)
    monkeypatch.setattr(coarse, "screen_dtype", torch.bfloat16)
    monkeypatch.setattr(coarse, "_screen_ND", atoms_ND.bfloat16())
    found = coarse.solve(targets_BD, atoms=8)
    assert torch.equal(found.support_BK, exact.support_BK)
    assert torch.equal(found.coefficients_BK, exact.coefficients_BK)


def test_a_coarse_screen_trusted_blindly_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without its error bound, the same coarse screen chooses other atoms."""
    atoms_ND, targets_BD = cloud(3000, 32, 3), cloud(200, 32, 4)
    exact = Dictionary(atoms_ND).solve(targets_BD, atoms=8)
    coarse = Dictionary(atoms_ND, use_gram=False)
    monkeypatch.setattr(coarse, "screen_dtype", torch.bfloat16)
    monkeypatch.setattr(coarse, "_screen_ND", atoms_ND.bfloat16())
    monkeypatch.setattr(coarse, "_product_bound", lambda residual_BD, dtype: residual_BD.new_full((200,), -1e30))
    assert not torch.equal(coarse.solve(targets_BD, atoms=8).support_BK, exact.support_BK)


@pytest.mark.parametrize("use_gram", [True, False])
def test_equal_atoms_give_the_lowest_index(use_gram: bool) -> None:
    base = cloud(50, 16, 5)
    atoms_ND = torch.cat([base, base, base])  # each atom three times, in three slices
    found = Dictionary(atoms_ND, use_gram=use_gram).solve(cloud(30, 16, 6), atoms=6)
    assert int(found.support_BK.max()) < 50


def test_more_equal_atoms_than_the_shortlist_holds() -> None:
    atoms_ND = cloud(1, 8, 1).repeat(100, 1)
    found = Dictionary(atoms_ND).solve(2 * atoms_ND[:1], atoms=3)
    assert found.support_BK.tolist() == [[0, -1, -1]]
    assert found.coefficients_BK[0, 0] == pytest.approx(2.0)


def test_targets_that_are_zero_or_out_of_reach_get_no_atoms() -> None:
    atoms_ND = torch.eye(4)[:2]
    targets_BD = torch.tensor([[0.0, 0, 0, 0], [0, 0, 1, 0], [0, 3, 0, 0]])
    found = Dictionary(atoms_ND).solve(targets_BD, atoms=2)
    assert found.support_BK.tolist() == [[-1, -1], [-1, -1], [1, -1]]
    assert found.residual_B.tolist() == [0.0, 1.0, 0.0]


def test_an_exact_combination_is_found_again() -> None:
    atoms_ND = torch.linalg.qr(cloud(32, 32, 7, 0.0)).Q
    weights = torch.tensor([3.0, -2.0, 1.0])
    found = Dictionary(atoms_ND).solve((weights @ atoms_ND[[4, 9, 30]])[None], atoms=5)
    assert found.support_BK[0].tolist() == [4, 9, 30, -1, -1]
    assert float(found.residual_B) < 1e-6


def test_unit_atoms_choose_by_angle_and_refer_to_the_rows_given() -> None:
    atoms_ND = torch.tensor([[10.0, 9.0], [0.0, 0.5]])
    target = torch.tensor([[0.0, 1.0]])
    assert Dictionary(atoms_ND).solve(target, atoms=1).support_BK.item() == 0
    found = Dictionary(atoms_ND, unit_atoms=True).solve(target, atoms=1)
    assert found.support_BK.item() == 1
    assert found.coefficients_BK.item() == pytest.approx(2.0)


def test_rows_do_not_depend_on_their_company_or_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    atoms_ND, targets_BD = cloud(500, 24, 8), cloud(90, 24, 9)
    dictionary = Dictionary(atoms_ND)
    whole = dictionary.solve(targets_BD, atoms=6)
    monkeypatch.setattr(omp, "_ROWS", 16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        cut = dictionary.solve(targets_BD, atoms=6)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole.support_BK, cut.support_BK)
    torch.testing.assert_close(whole.coefficients_BK, cut.coefficients_BK, rtol=1e-12, atol=1e-14)


def test_residuals_are_orthogonal_to_the_support_and_shrink() -> None:
    atoms_ND, targets_BD = cloud(400, 20, 10), cloud(50, 20, 11)
    dictionary = Dictionary(atoms_ND)
    earlier = torch.ones(50, dtype=torch.float64)
    for count in (1, 3, 6):
        found = dictionary.solve(targets_BD, atoms=count)
        chosen_BKD = atoms_ND[found.support_BK].double()
        residual_BD = targets_BD.double() - torch.einsum("bk,bkd->bd", found.coefficients_BK, chosen_BKD)
        assert torch.einsum("bd,bkd->bk", residual_BD, chosen_BKD).abs().max() < 1e-9
        assert (found.residual_B <= earlier + 1e-12).all()
        earlier = found.residual_B


@pytest.mark.parametrize(("shape", "atoms"), [((2, 5), 1), ((2, 4), 9), ((4,), 1), ((2, 4), 0)])
def test_what_does_not_fit_is_refused(shape: tuple[int, ...], atoms: int) -> None:
    with pytest.raises(ShapeMismatch):
        Dictionary(torch.eye(4)).solve(torch.zeros(shape), atoms=atoms)


def test_no_targets_give_an_empty_solution() -> None:
    assert Dictionary(torch.eye(4)).solve(torch.zeros(0, 4), atoms=2).support_BK.shape == (0, 2)


def test_an_empty_dictionary_is_refused() -> None:
    with pytest.raises(ShapeMismatch):
        Dictionary(torch.zeros(0, 4))
