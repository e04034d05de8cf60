"""Chunked cross-entropy against the formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import recipes.train.losses as losses
from recipes.train.losses import score_tokens, token_weights, weighted_token_losses
from vpstore.errors import RecipeRefused, ShapeMismatch


def naive(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, valid: int):  # type: ignore[no-untyped-def]
    """Loss, nll and both gradients, float64, one token at a time."""
    h, w = hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    nll = []
    for n in range(len(labels)):
        scores = torch.stack([(w[v] * h[n]).sum() for v in range(valid)])
        nll.append(torch.logsumexp(scores, 0) - scores[labels[n]])
    stacked = torch.stack(nll)
    loss = (stacked * weight.double()).sum()
    loss.backward()
    return loss.detach(), stacked.detach(), h.grad, w.grad


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 5), st.integers(2, 23), st.integers(0, 3), st.integers(1, 10), st.integers(0, 99)
)
def test_equals_the_naive_formula(n: int, h: int, valid: int, padding: int, chunk: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=g).mul_(3).requires_grad_()
    head = torch.randn(valid + padding, h, generator=g).requires_grad_()
    labels = torch.randint(0, valid, (n,), generator=g)
    weight = torch.rand(n, generator=g)
    loss, nll = weighted_token_losses(hidden, head, labels, weight, valid_vocab=valid, chunk=chunk)
    (2.0 * loss).backward()
    want_loss, want_nll, want_h, want_w = naive(hidden, head, labels, weight, valid)
    torch.testing.assert_close(loss.detach().double(), want_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nll.double(), want_nll, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hidden.grad.double(), 2 * want_h, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.grad.double(), 2 * want_w, rtol=1e-4, atol=1e-4)
    assert not head.grad[valid:].any()  # padding ids get nothing


def test_blocks_of_the_vocabulary_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(1)
    hidden, head = torch.randn(6, 8, generator=g), torch.randn(3000, 8, generator=g)
    labels = torch.tensor([0, 255, 256, 257, 2999, 1023])
    results = []
    for elements in (1, 1 << 30):  # blocks of 256 ids, and one block
        monkeypatch.setitem(losses._BLOCK_ELEMENTS, "cpu", elements)
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        loss, _ = weighted_token_losses(h, w, labels, torch.full((6,), 1 / 6), valid_vocab=3000, chunk=4)
        loss.backward()
        best = score_tokens(hidden, head, labels, valid_vocab=3000, chunk=4).best_N
        results.append((loss.detach(), h.grad, w.grad, best))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert torch.equal(results[0][3], (hidden @ head.T).argmax(1))
    reference = torch.nn.functional.cross_entropy(hidden @ head.T, labels)
    torch.testing.assert_close(results[0][0], reference, rtol=1e-5, atol=1e-5)


def test_large_scores_stay_finite_and_the_best_id_wins_ties_by_index() -> None:
    hidden, head = torch.tensor([[1e4], [-1e4], [0.0]]), torch.tensor([[1.0], [-1.0], [1.0], [0.5]])
    scores = score_tokens(hidden, head, torch.tensor([0, 1, 3]), valid_vocab=4)
    assert torch.allclose(scores.nll_N, torch.tensor([math.log(2), 0.0, math.log(4)]), atol=1e-2)
    assert scores.best_N.tolist() == [0, 1, 0]


def test_full_vocabulary_masks_the_reserved_ids() -> None:
    hidden, head = torch.zeros(2, 4), torch.zeros(201088, 4)
    head[200500] = 100.0
    hidden[:, 0] = 1.0
    loss, _ = weighted_token_losses(hidden, head, torch.tensor([5, 200018]), torch.full((2,), 0.5))
    assert loss.item() == pytest.approx(math.log(200019), rel=1e-6)


def test_no_head_gradient_where_none_is_needed() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    head = torch.randn(11, 4)
    loss, _ = weighted_token_losses(hidden, head, torch.tensor([1, 2, 3]), torch.ones(3), valid_vocab=11)
    loss.backward()
    assert head.grad is None
    assert hidden.grad is not None


def test_labels_and_shapes_that_do_not_fit_are_refused() -> None:
    hidden, head = torch.zeros(2, 4), torch.zeros(10, 4)
    with pytest.raises(RecipeRefused, match="not an id"):
        weighted_token_losses(hidden, head, torch.tensor([1, 9]), torch.ones(2), valid_vocab=9)
    with pytest.raises(ShapeMismatch):
        weighted_token_losses(hidden, torch.zeros(10, 5), torch.tensor([1, 2]), torch.ones(2), valid_vocab=9)


def test_bfloat16_inputs_get_bfloat16_gradients_of_float32_arithmetic() -> None:
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(5, 8, generator=g).bfloat16().requires_grad_()
    head = torch.randn(40, 8, generator=g).bfloat16().requires_grad_()
    labels, weight = torch.randint(0, 40, (5,), generator=g), torch.full((5,), 0.2)
    weighted_token_losses(hidden, head, labels, weight, valid_vocab=40)[0].backward()
    wide = [tensor.detach().float().requires_grad_() for tensor in (hidden, head)]
    weighted_token_losses(*wide, labels, weight, valid_vocab=40)[0].backward()
    for narrow, full in zip((hidden, head), wide, strict=True):
        assert torch.equal(narrow.grad, full.grad.bfloat16())


def test_span_means_are_over_the_global_batch() -> None:
    """T18: cut in the middle, means of micro-batch means differ; these weights do not."""
    nll, span = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), torch.tensor([1, 1, 2, 1, 2])
    counts = (0, 3, 2)
    weight = token_weights(span, counts, loss="span", span_weights=(1.0, 1.0, 0.5))
    assert float(torch.dot(weight, nll)) == pytest.approx((1 + 2 + 8) / 3 + 0.5 * (4 + 16) / 2)
    halves = [token_weights(part, counts, loss="span", span_weights=(1.0, 1.0, 0.5)) for part in span.split(2)]
    assert torch.equal(torch.cat(halves), weight)
    plain = token_weights(span, counts, loss="plain", span_weights=(1.0, 1.0, 1.0))
    assert float(torch.dot(plain, nll)) == pytest.approx(31 / 5)
