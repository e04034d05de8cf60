"""Orthogonal matching pursuit on a GPU: what the CPU chooses, whatever fits on the card and whoever comes along."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from recipes.ops import omp_cuda
from recipes.ops.omp import Dictionary, Solution

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def cloud(rows: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator) * (1 + torch.rand(rows, 1, generator=generator))


def clusters() -> Tensor:
    """Rows that bfloat16, and half of them that float16 cannot tell apart."""
    near = cloud(800, 48, 1).view(20, 40, 48)
    return (cloud(20, 48, 0)[:, None] + torch.tensor([1e-3, 1e-5]).repeat(20)[:, None] * near).flatten(0, 1)


CASES: dict[str, tuple[Tensor, Tensor, int]] = {
    "normal": (cloud(9000, 96, 0), cloud(300, 96, 1), 24),
    "no multiple of anything": (cloud(777, 33, 2), cloud(5, 33, 3), 20),
    "each atom three times": (cloud(200, 24, 4).repeat(3, 1), cloud(40, 24, 5), 10),
    "more equal atoms than a list holds": (cloud(1, 8, 6).repeat(300, 1), cloud(10, 8, 7), 3),
    "clusters": (clusters(), cloud(60, 48, 8), 20),
    "whole numbers": (cloud(600, 12, 9).round(), cloud(60, 12, 10).round(), 8),
    "zero rows": (torch.cat([torch.zeros(70, 24), cloud(300, 24, 11)]), cloud(20, 24, 12), 6),
    "targets that are atoms, long and short": (
        cloud(300, 24, 13),
        torch.cat([cloud(300, 24, 13)[:20] * 1e-20, cloud(300, 24, 13)[20:40] * 1e20]),
        6,
    ),
    "targets of zero or out of reach": (
        torch.eye(4)[:2],
        torch.tensor([[0.0, 0, 0, 0], [0, 0, 1, 0], [0, 3, 0, 0]]),
        2,
    ),
    "many atoms a target": (cloud(400, 200, 14), cloud(6, 200, 15), 150),
    "atoms of very different lengths": (
        cloud(3000, 40, 16) * torch.logspace(-6, 6, 3000)[:, None],
        cloud(40, 40, 17),
        8,
    ),
}


def check(found: Solution, expected: Solution) -> None:
    assert torch.equal(found.support_BK.cpu(), expected.support_BK)
    torch.testing.assert_close(found.coefficients_BK.cpu(), expected.coefficients_BK, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(found.residual_B.cpu(), expected.residual_B, rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_card_chooses_what_the_processor_chooses(name: str) -> None:
    atoms_ND, targets_BD, count = CASES[name]
    check(
        Dictionary(atoms_ND, device="cuda").solve(targets_BD, atoms=count),
        Dictionary(atoms_ND).solve(targets_BD, atoms=count),
    )


def test_the_textbook_variant() -> None:
    atoms_ND, targets_BD, count = CASES["normal"]
    expected = Dictionary(atoms_ND, unit_atoms=True).solve(targets_BD, atoms=count)
    check(Dictionary(atoms_ND, unit_atoms=True, device="cuda").solve(targets_BD, atoms=count), expected)


LEAST = 256 * omp_cuda.target_bytes(9000, 96, 64)  # what a card must have room for besides the atoms


@pytest.mark.parametrize(
    ("free", "route"),
    [
        (LEAST + 6 * 9024 * 96, "cuda"),
        (LEAST + 3 * 9024 * 96, "cuda, atoms on the host, 1 slice"),
        (LEAST + 9024 * 96, "cuda, atoms on the host, 5 slices"),
        (LEAST // 2, "cuda, atoms on the host, 141 slices"),
    ],
)
def test_a_card_without_room_for_the_dictionary_gives_the_same_and_says_so(
    free: int, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    atoms_ND, targets_BD, count = CASES["normal"]
    whole = Dictionary(atoms_ND, device="cuda").solve(targets_BD, atoms=count)
    monkeypatch.setattr(omp_cuda, "free_bytes", lambda device: free)
    cramped = Dictionary(atoms_ND, device="cuda")
    assert cramped.route == route
    found = cramped.solve(targets_BD, atoms=count)
    assert torch.equal(found.support_BK, whole.support_BK)
    assert torch.equal(found.coefficients_BK, whole.coefficients_BK)


def test_a_target_does_not_depend_on_its_company() -> None:
    atoms_ND, targets_BD, count = CASES["normal"]
    dictionary = Dictionary(atoms_ND, device="cuda")
    whole = dictionary.solve(targets_BD, atoms=count)
    for part in (slice(0, 1), slice(7, 100), slice(299, 300)):
        found = dictionary.solve(targets_BD[part], atoms=count)
        assert torch.equal(found.support_BK, whole.support_BK[part])
        assert torch.equal(found.coefficients_BK, whole.coefficients_BK[part])


def test_a_screen_worse_than_its_bound_goes_wrong() -> None:
    """Negative control: atoms cut to four bits under the bound of eleven, and other atoms are chosen."""
    atoms_ND, targets_BD, count = CASES["normal"]
    expected = Dictionary(atoms_ND, device="cuda").solve(targets_BD, atoms=count)
    coarse: Any = Dictionary(atoms_ND, device="cuda")
    screen_PD = coarse._card._screen_PD
    screen_PD.view(torch.int16).bitwise_and_(~0x7F)
    assert not torch.equal(coarse.solve(targets_BD, atoms=count).support_BK, expected.support_BK)
