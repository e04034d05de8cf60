"""The chunked head loss against torch's own cross-entropy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.train.head_loss import mean_cross_entropy


def drawn(rows: int, *, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 6, generator=generator) * scale
    head = torch.randn(23, 6, generator=generator)
    return hidden.requires_grad_(), head.requires_grad_(), torch.randint(23, (rows,), generator=generator)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 17), chunk=st.integers(1, 20))
def test_loss_and_gradients_are_those_of_the_plain_formula(rows: int, chunk: int) -> None:
    hidden, head, labels = drawn(rows)
    plain = torch.nn.functional.cross_entropy(hidden @ head.T, labels)
    expected = torch.autograd.grad(3.0 * plain, (hidden, head))
    loss = mean_cross_entropy(hidden, head, labels, chunk=chunk)
    found = torch.autograd.grad(3.0 * loss, (hidden, head))
    torch.testing.assert_close(loss, plain)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_hopeless_label_gives_a_finite_loss_and_the_right_gradient() -> None:
    hidden, head, _ = drawn(3, scale=60.0)
    labels = (hidden @ head.T).argmin(dim=1)
    loss = mean_cross_entropy(hidden, head, labels, chunk=2)
    (found,) = torch.autograd.grad(loss, hidden)
    (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(hidden @ head.T, labels), hidden)
    assert torch.isfinite(loss)
    torch.testing.assert_close(found, expected)


def test_autocast_computes_in_bfloat16_and_keeps_float32_gradients() -> None:
    hidden, head, labels = drawn(9)
    with torch.autocast("cpu", torch.bfloat16):
        loss = mean_cross_entropy(hidden, head, labels, chunk=4)
    assert loss.dtype == torch.float32
    found = torch.autograd.grad(loss, (hidden, head))
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(hidden @ head.T, labels), (hidden, head))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert 0 < (ours - theirs).norm() / theirs.norm() < 0.02


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu() -> None:
    hidden, head, labels = drawn(16)
    on_gpu = mean_cross_entropy(hidden.cuda(), head.cuda(), labels.cuda(), chunk=5)
    torch.testing.assert_close(on_gpu.cpu(), mean_cross_entropy(hidden, head, labels, chunk=5))
