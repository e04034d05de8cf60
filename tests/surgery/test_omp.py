"""Orthogonal matching pursuit: the fast solver chooses exactly what a slow float64 loop chooses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recipes.ops import omp, omp_choice
from recipes.ops.omp import Dictionary, Solution
from recipes.ops.omp_gram import GramBlock, GramScreen
from recipes.ops.omp_product import ProductBlock, ProductScreen
from recipes.ops.omp_state import extend, residual, settle, start
from vpstore.errors import RecipeRefused, ShapeMismatch

ROUTES = ["gram", "float32", "bfloat16"]


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


@contextmanager
def dictionary_by(route: str, atoms_ND: Tensor, **options: Any) -> Iterator[Dictionary]:
    """A dictionary that goes one way; the processor here need not have units for bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(omp, "best_dtype", lambda: torch.bfloat16 if route == "bfloat16" else torch.float32)
        yield Dictionary(atoms_ND, use_gram=route == "gram", **options)


def solve_by(route: str, atoms_ND: Tensor, targets_BD: Tensor, count: int) -> Solution:
    with dictionary_by(route, atoms_ND) as dictionary:
        return dictionary.solve(targets_BD, atoms=count)


def assert_equal(found: Solution, expected: Solution) -> None:
    """The same bits."""
    assert torch.equal(found.support_BK, expected.support_BK)
    assert torch.equal(found.coefficients_BK, expected.coefficients_BK)
    assert torch.equal(found.residual_B, expected.residual_B)


def structured(rows: int, width: int, seed: int) -> Tensor:
    """A common part, a spectrum that falls, lengths that differ, bfloat16: as rows of an embedding are."""
    mix = torch.linalg.qr(cloud(width, width, 99, 0.0)).Q * torch.arange(1, width + 1)[:, None] ** -0.7
    return (cloud(rows, width, seed, 4.0) @ mix + 0.3).bfloat16().float()


def clusters(rows: int, width: int, seed: int) -> Tensor:
    """Rows of which bfloat16, and half of which float16 cannot tell from their neighbours."""
    centre = cloud(20, width, seed).repeat_interleave(-(-rows // 20), 0)[:rows]
    return centre + torch.tensor([1e-3, 1e-5]).repeat(-(-rows // 2))[:rows, None] * cloud(rows, width, seed + 1)


KINDS: dict[str, Tensor] = {
    "normal": cloud(500, 40, 1),
    "structured": structured(500, 40, 2),
    "clusters": clusters(500, 40, 3),
    "each three times": cloud(300, 40, 4).repeat(3, 1),
    "zero rows": torch.cat([torch.zeros(140, 40), cloud(200, 40, 5)]),
    "whole numbers": cloud(500, 40, 6).round(),
    "very different lengths": cloud(500, 40, 7) * torch.logspace(-6, 6, 500)[:, None],
    "tiny": cloud(300, 40, 8) * 1e-38,
}


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(4, 300),
    width=st.integers(2, 24),
    count=st.integers(1, 12),
    seed=st.integers(0, 10_000),
)
def test_equals_the_definition(route: str, rows: int, width: int, count: int, seed: int) -> None:
    check_against_slow(route, cloud(rows, width, seed), cloud(3, width, seed + 1), min(count, rows))


def check_against_slow(route: str, atoms_ND: Tensor, targets_BD: Tensor, count: int) -> None:
    found = solve_by(route, atoms_ND, targets_BD, count)
    for row, target_D in enumerate(targets_BD):
        support, weights = slow_omp(atoms_ND, target_D, count)
        chosen = found.support_BK[row]
        assert chosen[: len(support)].tolist() == support
        assert (chosen[len(support) :] == -1).all()
        assert (found.coefficients_BK[row, len(support) :] == 0).all()
        torch.testing.assert_close(found.coefficients_BK[row, : len(support)], weights, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["structured", "clusters", "zero rows", "very different lengths"])
def test_rows_of_all_kinds_equal_the_definition(kind: str) -> None:
    check_against_slow("bfloat16", KINDS[kind], structured(3, 40, 20), 6)


@pytest.mark.parametrize("kind", KINDS)
def test_all_routes_give_the_same_bits(kind: str) -> None:
    atoms_ND, targets_BD = KINDS[kind], torch.cat([cloud(30, 40, 30), structured(30, 40, 31), cloud(8, 40, 6).round()])
    expected = solve_by("float32", atoms_ND, targets_BD, 12)
    for route in ("gram", "bfloat16"):
        assert_equal(solve_by(route, atoms_ND, targets_BD, 12), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ROUTES)
def test_no_score_is_farther_off_than_its_screen_says(route: str, kind: str) -> None:
    """The bound itself, for every atom: all else rests on it."""
    atoms_ND, state = KINDS[kind], start(structured(16, 40, 40), 6)
    with dictionary_by(route, atoms_ND) as dictionary:
        screen = dictionary._screen(16, 6)
        with screen.block(state) as view:
            for step in range(6):
                look = view.look(state, step)
                exact_BN = (residual(state, step, slice(None)) @ dictionary.atoms_ND.double().T).abs()
                chosen_B, _ = settle(residual(state, step, slice(None)), state.support_BK[:, :step], known(dictionary))
                for slice_ in range(len(screen.norm_J)):
                    found_BW = view.scores(torch.arange(16), torch.full((16,), slice_)).double()
                    span = exact_BN[:, slice_ * screen.width :][:, : screen.width] * look.unit_B[:, None]
                    found_BW = found_BW[:, : span.shape[1]]
                    off_BW = (found_BW - span).abs() - screen.relative * found_BW
                    allowed_BW = (look.error_B * screen.norm_J[slice_].double())[:, None].expand_as(off_BW)
                    if route == "gram":  # of a chosen atom the screen knows less, and says so in `taken_B`
                        atom_W = slice_ * screen.width + torch.arange(span.shape[1])
                        is_chosen_BW = (state.support_BK[:, :, None] == atom_W).any(1)
                        allowed_BW = torch.where(is_chosen_BW, look.taken_B[:, None], allowed_BW)
                    assert (off_BW <= allowed_BW).all()
                    assert (look.best_JB[slice_].double() >= found_BW.amax(1)).all()
                extend(state, step, chosen_B.clamp(min=0), dictionary.atoms_ND)


def known(dictionary: Dictionary) -> omp.Atoms:
    return omp.Atoms(dictionary.atoms_ND, dictionary.norms_N)


@pytest.mark.parametrize("route", ["gram", "bfloat16"])
def test_a_bound_that_is_too_small_goes_wrong(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: trusted without its bound, the same screen chooses other atoms."""
    atoms_ND, targets_BD = cloud(4000, 32, 3), cloud(400, 32, 4)
    exact = solve_by(route, atoms_ND, targets_BD, 10)
    block: Any = GramBlock if route == "gram" else ProductBlock
    honest = block.look

    def boast(self: Any, state: Any, step: int) -> Any:
        look = honest(self, state, step)
        return replace(look, error_B=torch.zeros_like(look.error_B))

    monkeypatch.setattr(block, "look", boast)
    with dictionary_by(route, atoms_ND) as dictionary:
        dictionary._screen(400, 10).relative = 0.0
        assert not torch.equal(dictionary.solve(targets_BD, atoms=10).support_BK, exact.support_BK)


@pytest.mark.parametrize("route", ROUTES)
def test_what_a_list_cannot_hold_is_settled_among_all(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    atoms_ND, targets_BD = KINDS["clusters"], cloud(40, 40, 50)
    expected = solve_by(route, atoms_ND, targets_BD, 8)
    assert expected.tally.steps == 320
    assert expected.tally.ranked > 0
    monkeypatch.setattr(omp_choice, "_LISTED", 1)
    found = solve_by(route, atoms_ND, targets_BD, 8)
    assert_equal(found, expected)
    assert found.tally.ranked == 0
    assert found.tally.settled >= expected.tally.ranked


@pytest.mark.parametrize("route", ROUTES)
def test_equal_atoms_give_the_lowest_index(route: str) -> None:
    base = cloud(50, 16, 5)
    atoms_ND = torch.cat([base, base, base])  # each atom three times, in different slices
    assert int(solve_by(route, atoms_ND, cloud(30, 16, 6), 6).support_BK.max()) < 50


@pytest.mark.parametrize("count", [100, 2000])
def test_more_equal_atoms_than_a_list_holds(count: int) -> None:
    atoms_ND = cloud(1, 8, 1).repeat(count, 1)
    found = Dictionary(atoms_ND).solve(2 * atoms_ND[:1], atoms=3)
    assert found.support_BK.tolist() == [[0, -1, -1]]
    assert found.coefficients_BK[0, 0] == pytest.approx(2.0)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("factor", [1.0, 1e-25, 1e25])
def test_targets_that_are_atoms_need_one(route: str, factor: float) -> None:
    atoms_ND = torch.nn.functional.normalize(cloud(300, 24, 13))
    found = solve_by(route, atoms_ND, factor * atoms_ND[100:140], 4)
    assert found.support_BK.tolist() == [[row, -1, -1, -1] for row in range(100, 140)]
    torch.testing.assert_close(
        found.coefficients_BK[:, 0], torch.full((40,), factor, dtype=torch.float64), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("route", ROUTES)
def test_targets_that_are_zero_or_out_of_reach_get_no_atoms(route: str) -> None:
    atoms_ND = torch.eye(4)[:2]
    targets_BD = torch.tensor([[0.0, 0, 0, 0], [0, 0, 1, 0], [0, 3, 0, 0]])
    found = solve_by(route, atoms_ND, targets_BD, 2)
    assert found.support_BK.tolist() == [[-1, -1], [-1, -1], [1, -1]]
    assert found.residual_B.tolist() == [0.0, 1.0, 0.0]


def test_atoms_of_zero_are_never_chosen() -> None:
    found = Dictionary(torch.zeros(300, 4)).solve(torch.eye(4), atoms=2)
    assert (found.support_BK == -1).all()
    assert found.residual_B.tolist() == [1.0] * 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
def test_what_is_not_finite_is_refused_by_row(bad: float) -> None:
    rows = torch.ones(5, 4, dtype=torch.float64)
    rows[3, 1] = bad
    with pytest.raises(RecipeRefused) as atoms:
        Dictionary(rows)
    assert (atoms.value.what, atoms.value.where) == ("an atom is not finite", "row 3")
    with pytest.raises(RecipeRefused) as targets:
        Dictionary(torch.eye(4)).solve(rows, atoms=1)
    assert (targets.value.what, targets.value.where) == ("a target is not finite", "row 3")


def test_coarser_products_elsewhere_do_not_reach_in_here() -> None:
    atoms_ND, targets_BD = cloud(900, 40, 1), cloud(60, 40, 30)
    expected = solve_by("float32", atoms_ND, targets_BD, 8)
    torch.set_float32_matmul_precision("medium")
    try:
        assert_equal(solve_by("float32", atoms_ND, targets_BD, 8), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_table_is_made_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(omp, "best_dtype", lambda: torch.float32)
    dictionary = Dictionary(cloud(900, 40, 1))
    assert isinstance(dictionary._screen(2, 4), ProductScreen)
    assert isinstance(dictionary._screen(500, 4), GramScreen)
    assert isinstance(dictionary._screen(2, 4), GramScreen)  # it is there now
    monkeypatch.setattr(omp, "_GRAM_BYTES", 1000)
    assert isinstance(dictionary._screen(500, 4), ProductScreen)


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


@pytest.mark.parametrize("route", ROUTES)
def test_rows_do_not_depend_on_their_company_or_the_threads(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    atoms_ND, targets_BD = cloud(500, 24, 8), cloud(90, 24, 9)
    whole = solve_by(route, atoms_ND, targets_BD, 6)
    monkeypatch.setattr(omp, "_ROWS", 16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        cut = solve_by(route, atoms_ND, targets_BD, 6)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole.support_BK, cut.support_BK)
    assert whole.tally.steps == cut.tally.steps
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
