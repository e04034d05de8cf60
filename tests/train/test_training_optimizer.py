"""NorMuon and AdamW against slow references written from the formulas; the learning rate."""

from __future__ import annotations

import math

import pytest
import torch

import recipes.train.optimizer as optimizer_module
from recipes.params.training import OptimizerParams
from recipes.train.optimizer import POLAR_EXPRESS, Optimizer, clip_gradients, gradient_norm, kind_of, orthogonal
from recipes.train.schedule import factor
from vpstore.errors import RecipeRefused

SETTINGS = OptimizerParams(
    matrix_rate=0.03,
    embedding_rate=0.02,
    head_rate=0.01,
    vector_rate=0.05,
    frequency_rate=0.04,
    residual_rate=0.06,
    matrix_decay=0.1,
    table_decay=0.2,
    clip_norm=1.0,
)


def slow_normuon(weight, gradients, factors, settings):  # type: ignore[no-untyped-def]
    """One matrix, float64, entry by entry where the formula is about entries."""
    w = weight.double().clone()
    rows, columns = w.shape
    momentum, second = torch.zeros_like(w), torch.zeros(rows).double()
    for gradient, share in zip(gradients, factors, strict=True):
        g = gradient.double()
        momentum = settings.momentum * momentum + (1 - settings.momentum) * g
        x = settings.momentum * momentum + (1 - settings.momentum) * g
        x = x / (1.02 * math.sqrt(float((x**2).sum())) + 1e-6)
        for a, b, c in POLAR_EXPRESS:  # p(x) = a x + b x^3 + c x^5 on the singular values
            u, s, v = torch.linalg.svd(x, full_matrices=False)
            x = u @ torch.diag(a * s + b * s**3 + c * s**5) @ v
        before = math.sqrt(float((x**2).sum()))
        for r in range(rows):
            second[r] = settings.normuon_beta * second[r] + (1 - settings.normuon_beta) * float((x[r] ** 2).mean())
            x[r] = x[r] / (math.sqrt(second[r]) + 1e-10)
        x = x * before / math.sqrt(float((x**2).sum()))
        rate = settings.matrix_rate * share
        w = w * (1 - rate * settings.matrix_decay) - rate * math.sqrt(max(1.0, rows / columns)) * x
    return w, second


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (3, 4, 7), (3, 7, 4)])
def test_normuon_follows_the_formula(shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    name = "model.layers.1.mlp.experts.fc1_weight" if len(shape) == 3 else "model.layers.1.mlp.fc1.weight"
    weight = torch.randn(shape, generator=g).requires_grad_()
    start = weight.detach().clone()
    gradients = [torch.randn(shape, generator=g) for _ in range(4)]
    factors = (0.5, 1.0, 1.0, 0.25)
    optimizer = Optimizer({name: weight}, SETTINGS)
    for gradient, share in zip(gradients, factors, strict=True):
        weight.grad = gradient.clone()
        optimizer.step(share)
    second = optimizer.state[name]["second_moment"]
    assert second.shape == (*shape[:-1], 1)
    for index in range(shape[0]) if len(shape) == 3 else [...]:
        want, want_second = slow_normuon(start[index], [one[index] for one in gradients], factors, SETTINGS)
        torch.testing.assert_close(weight.detach()[index].double(), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(second[index].flatten().double(), want_second, rtol=1e-4, atol=1e-7)


def test_orthogonal_pushes_singular_values_towards_one_and_keeps_zero() -> None:
    values = torch.linalg.svdvals(orthogonal(torch.randn(2, 24, 40, generator=torch.Generator().manual_seed(1))))
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert not orthogonal(torch.zeros(1, 4, 6)).any()


def test_matrices_that_are_stacked_move_as_they_do_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(elements: int) -> list[torch.Tensor]:
        monkeypatch.setitem(optimizer_module._BATCH_ELEMENTS, "cpu", elements)
        g = torch.Generator().manual_seed(2)
        weights = {
            f"model.layers.{i}.mlp.fc1.weight": torch.randn(6, 8, generator=g).requires_grad_() for i in range(3)
        }
        optimizer = Optimizer(weights, SETTINGS)
        for _ in range(2):
            for weight in weights.values():
                weight.grad = torch.randn(6, 8, generator=g)
            optimizer.step(1.0)
        return [weight.detach() for weight in weights.values()]

    for alone, stacked in zip(trained(1), trained(1 << 20), strict=True):
        torch.testing.assert_close(alone, stacked, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "kind", "decay"),
    [
        ("model.embed_tokens.weight", "embedding", 0.2),
        ("lm_head.weight", "head", 0.2),
        ("model.norm.weight", "vector", 0.0),
        ("model.layers.0.mlp.experts.fc1_bias", "vector", 0.0),
        ("model.layers.0.self_attn.softmax_offset", "vector", 0.0),
        ("model.grape.log_freq", "frequency", 0.0),
        ("model.layers.3.self_attn.value_residual", "residual", 0.0),
    ],
)
def test_the_others_are_adamw_with_decay_on_tables_only(
    name: str, kind: str, decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer_module, "_PASS_ELEMENTS", 5)  # several pieces
    shape = {"residual": (), "frequency": (12,)}.get(kind, (12,) if "norm" in name or "offset" in name else (4, 3))
    g = torch.Generator().manual_seed(4)
    weight = torch.randn(shape, generator=g).requires_grad_()
    twin = weight.detach().clone().requires_grad_()
    rate = getattr(SETTINGS, f"{kind}_rate")
    reference = torch.optim.AdamW([twin], lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)
    optimizer = Optimizer({name: weight}, SETTINGS)
    assert optimizer.kinds[name] == kind
    for _ in range(4):
        weight.grad = torch.randn(shape, generator=g)
        twin.grad = weight.grad.clone()
        optimizer.step(1.0)
        reference.step()
    torch.testing.assert_close(weight, twin, rtol=1e-5, atol=1e-6)


def test_kinds_of_all_matrices() -> None:
    for suffix in ("self_attn.qkv_proj.weight", "self_attn.a_q.weight", "mlp.router.weight", "mlp.fc2.weight"):
        assert kind_of(f"model.layers.1.{suffix}", torch.zeros(2, 3)) == "matrix"
    assert kind_of("model.layers.1.mlp.experts.fc2_weight", torch.zeros(2, 3, 4)) == "matrix"


def test_a_weight_without_a_gradient_is_left_alone() -> None:
    weights = {name: torch.ones(3, 3).requires_grad_() for name in ("lm_head.weight", "model.layers.0.mlp.fc1.weight")}
    optimizer = Optimizer(weights, SETTINGS)
    weights["lm_head.weight"].grad = torch.ones(3, 3)
    optimizer.step(1.0)
    assert torch.equal(weights["model.layers.0.mlp.fc1.weight"], torch.ones(3, 3))
    assert optimizer.steps == {"lm_head.weight": 1, "model.layers.0.mlp.fc1.weight": 0}


def test_saved_state_of_another_model_is_refused() -> None:
    first = Optimizer({"lm_head.weight": torch.ones(2, 2)}, SETTINGS)
    other = Optimizer({"model.norm.weight": torch.ones(2)}, SETTINGS)
    with pytest.raises(RecipeRefused, match="another model"):
        other.load(*first.saved())


def test_clipping_scales_all_gradients_by_their_common_norm() -> None:
    weights = {"a": torch.zeros(2).requires_grad_(), "b": torch.zeros(1).requires_grad_()}
    weights["a"].grad, weights["b"].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    norm = float(gradient_norm(weights))
    assert norm == pytest.approx(5.0)
    clip_gradients(weights, norm, 10.0)
    assert weights["b"].grad.item() == 4.0
    clip_gradients(weights, norm, 1.0)
    assert weights["b"].grad.item() == pytest.approx(0.8)
    weights["b"].grad = torch.tensor([math.nan])
    assert math.isnan(float(gradient_norm(weights)))
    assert float(gradient_norm({})) == 0.0
    clip_gradients(weights, math.nan, 1.0)
    assert weights["a"].grad[0].item() == pytest.approx(0.6)


def test_the_rate_rises_falls_and_ends_where_it_should() -> None:
    for shape in ("cosine", "linear"):
        rates = [factor(step, total=20, warmup=4, shape=shape, final=0.1) for step in range(20)]  # type: ignore[arg-type]
        assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
        assert rates[-1] == pytest.approx(0.1)
        assert all(later <= earlier for earlier, later in zip(rates[3:], rates[4:], strict=False))
    assert factor(19, total=20, warmup=4, shape="constant", final=0.0) == 1.0
    assert factor(0, total=1, warmup=0, shape="cosine", final=0.0) == 1.0
