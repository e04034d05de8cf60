"""The loss by whole products against the formula, in float32 and in bfloat16."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.train.head_loss import weighted_losses
from vpstore.errors import ShapeMismatch

VALID, VOCABULARY = 21, 23


def drawn(rows: int, *, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 6, generator=generator) * scale
    head = torch.randn(VOCABULARY, 6, generator=generator)
    labels = torch.randint(VALID, (rows,), generator=generator)
    return hidden.requires_grad_(), head.requires_grad_(), labels, torch.rand(rows, generator=generator)


def plain(
    hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    nll = torch.nn.functional.cross_entropy((hidden @ head.T)[:, :VALID], labels, reduction="none")
    return (nll * weight).sum(), nll


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 17), chunk=st.integers(1, 20))
def test_loss_and_gradients_are_those_of_the_plain_formula(rows: int, chunk: int) -> None:
    hidden, head, labels, weight = drawn(rows)
    want, want_nll = plain(hidden, head, labels, weight)
    expected = torch.autograd.grad(3.0 * want, (hidden, head))
    loss, nll = weighted_losses(hidden, head, labels, weight, valid_vocab=VALID, chunk=chunk)
    found = torch.autograd.grad(3.0 * loss, (hidden, head))
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(nll, want_nll.detach())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not found[1][VALID:].any()  # padding ids get nothing


def test_a_hopeless_label_gives_a_finite_loss_and_the_right_gradient() -> None:
    hidden, head, _, weight = drawn(3, scale=60.0)
    labels = (hidden @ head.T)[:, :VALID].argmin(dim=1)
    loss, _ = weighted_losses(hidden, head, labels, weight, valid_vocab=VALID, chunk=2)
    (found,) = torch.autograd.grad(loss, hidden)
    (expected,) = torch.autograd.grad(plain(hidden, head, labels, weight)[0], hidden)
    assert torch.isfinite(loss)
    torch.testing.assert_close(found, expected)


def test_narrow_hidden_states_get_narrow_gradients_and_the_head_wide_ones() -> None:
    hidden, head, labels, weight = drawn(9)
    narrow = hidden.detach().bfloat16().requires_grad_()
    loss, nll = weighted_losses(narrow, head, labels, weight, valid_vocab=VALID, chunk=4)
    assert loss.dtype == nll.dtype == torch.float32
    found = torch.autograd.grad(loss, (narrow, head))
    assert [one.dtype for one in found] == [torch.bfloat16, torch.float32]
    expected = torch.autograd.grad(plain(hidden, head, labels, weight)[0], (hidden, head))
    for ours, theirs in zip(found, expected, strict=True):
        assert 0 < (ours.float() - theirs).norm() / theirs.norm() < 0.02


def test_a_micro_batch_without_a_label_that_counts_costs_nothing_and_moves_nothing() -> None:
    hidden, head, labels, weight = drawn(1)
    none = slice(0, 0)
    loss, nll = weighted_losses(hidden[none], head, labels[none], weight[none], valid_vocab=VALID)
    assert loss.item() == 0
    assert len(nll) == 0
    assert not any(one.any() for one in torch.autograd.grad(loss, (hidden, head)))


def test_a_head_that_is_not_trained_gets_no_gradient_and_the_states_the_same_one() -> None:
    hidden, head, labels, weight = drawn(9)
    found = []
    for is_trained in (True, False):
        loss, _ = weighted_losses(hidden, head.requires_grad_(is_trained), labels, weight, valid_vocab=VALID, chunk=4)
        hidden.grad = head.grad = None
        loss.backward()
        found.append(hidden.grad)
        assert (head.grad is not None) == is_trained
    assert torch.equal(*found)


def test_tables_that_do_not_fit_are_refused() -> None:
    hidden, head, labels, weight = drawn(4)
    with pytest.raises(ShapeMismatch):
        weighted_losses(hidden, head, labels[:3], weight, valid_vocab=VALID)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_kernel_agrees_with_the_cpu(dtype: torch.dtype, apart: float) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, head = torch.randn(70, 64, generator=generator), torch.randn(20_000, 64, generator=generator)
    labels, weight = torch.randint(19_000, (70,), generator=generator), torch.rand(70, generator=generator)
    results = []
    for device in ("cpu", "cuda"):
        rows = hidden.to(device, torch.float32 if device == "cpu" else dtype).requires_grad_()
        table = head.to(device, copy=True).requires_grad_()
        loss, nll = weighted_losses(rows, table, labels.to(device), weight.to(device), valid_vocab=19_000, chunk=32)
        results.append([x.cpu().float() for x in (loss.detach(), nll, *torch.autograd.grad(loss, (rows, table)))])
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert (ours - theirs).norm() <= apart * theirs.norm()
