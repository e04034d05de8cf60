"""Router health figures on counts whose answers are known."""

import math

import pytest
import torch
from student_builder import SMALL_MOE, config_of, ids_of, student_of

from recipes.model.health import (
    LOAD_EDGES,
    added_counts,
    balance_loss,
    collapsed_layers,
    health_rows,
    layer_health,
    router_health,
    worst_health,
)
from vpstore.errors import ShapeMismatch


def test_an_even_load_is_healthy():
    health = layer_health(torch.full((256,), 9), torch.zeros(256))
    assert health.entropy == pytest.approx(math.log(256))
    assert (health.cv_percent, health.dead_percent) == (0.0, 0.0)
    assert health.max_load_percent == pytest.approx(100 / 256)
    assert sum(health.load_histogram) == 256
    assert health.load_histogram[LOAD_EDGES.index(1.0)] == 256


def test_a_collapsed_layer():
    counts = torch.tensor([40, 0, 0, 0])
    health = layer_health(counts, torch.tensor([-0.002, 0.001, 0.0, 0.0]))
    assert (health.entropy, health.max_load_percent, health.dead_percent) == (0.0, 100.0, 75.0)
    assert health.cv_percent == pytest.approx(100 * math.sqrt(3))
    assert (health.bias_min, health.bias_max) == pytest.approx((-0.002, 0.001))
    assert health.load_histogram[0] == 3
    assert health.load_histogram[-1] == 1


def test_loads_of_three_to_one():
    health = layer_health(torch.tensor([30, 10]), torch.zeros(2))
    assert health.entropy == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert health.cv_percent == pytest.approx(50.0)


@pytest.mark.parametrize(("counts", "bias"), [([0, 0], [0.0, 0.0]), ([1, 2], [0.0])])
def test_no_tokens_or_another_bias_are_refused(counts, bias):
    with pytest.raises(ShapeMismatch):
        layer_health(torch.tensor(counts), torch.tensor(bias))


def test_health_of_a_student():
    student = student_of(config_of("tpa", moe=SMALL_MOE), dtype=torch.float32)
    passes = []
    with torch.no_grad():
        for seed in (1, 2):
            _, state = student.hidden_and_state(ids_of(2, 30, seed), collect=True)
            passes.append(state.routing)
    counts = added_counts(passes)
    assert {number: int(one.sum()) for number, one in counts.items()} == dict.fromkeys((2, 3, 4), 2 * 2 * 30 * 4)
    layers = router_health(student, counts)
    assert sorted(layers) == [2, 3, 4]
    worst = worst_health(layers)
    assert worst["entropy_min"] == min(one.entropy for one in layers.values())
    assert worst["dead_percent_max"] == max(one.dead_percent for one in layers.values())
    rows = health_rows(layers)
    assert [row["layer"] for row in rows] == [2, 3, 4]
    assert rows[0]["cv_percent"] == layers[2].cv_percent
    before = student.layers[1].mlp.router.expert_bias.clone()
    student.update_expert_bias(counts)
    moved = student.layers[1].mlp.router.expert_bias - before
    overloaded = counts[2] > counts[2].double().mean()
    assert bool((moved[overloaded] < 0).all())
    assert bool((moved[~overloaded] >= 0).all())


def test_collapse_is_named_by_layer():
    layers = {
        2: layer_health(torch.tensor([10, 10, 10, 10]), torch.zeros(4)),
        3: layer_health(torch.tensor([40, 0, 0, 0]), torch.zeros(4)),
        5: layer_health(torch.tensor([25, 5, 5, 5]), torch.zeros(4)),
    }
    assert collapsed_layers(layers, max_dead_percent=10, max_load_percent=50) == [3, 5]
    assert collapsed_layers(layers, max_dead_percent=10, max_load_percent=70) == [3]
    assert collapsed_layers(layers, max_dead_percent=100, max_load_percent=100) == []


def test_a_dense_model_has_nothing_to_report():
    assert worst_health({}) == {}
    assert balance_loss({}).item() == 0.0
