"""Router health: how evenly each MoE layer spreads its tokens, and whether it has collapsed.

Place in the path: recipe -> **model**; computed from the counts that MoE layers leave behind, over as many batches as
the caller has added up.

Invariants: a pure function of counts and biases; percentages are 0 .. 100, entropies in nats.

Example:
    >>> layer_health(torch.tensor([10, 10, 10, 10]), torch.zeros(4)).entropy == math.log(4)
    True
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from recipes.model.moe import MixtureOfExperts
from recipes.model.routing import Routing
from recipes.model.transformer import Student
from vpstore.errors import ShapeMismatch

# Edges of the load histogram in multiples of the mean load: a bin holds low <= load / mean < high.
LOAD_EDGES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0, math.inf)


@dataclass(frozen=True)
class LayerHealth:
    """One layer's figures; a load is an expert's share of all choices."""

    entropy: float  # of the loads; ln E if uniform
    cv_percent: float  # standard deviation of the counts over their mean
    max_load_percent: float  # 100 / E if uniform
    dead_percent: float  # experts that no token chose
    bias_min: float
    bias_max: float
    load_histogram: tuple[int, ...]  # experts in each bin of LOAD_EDGES


def layer_health(counts_E: Tensor, expert_bias_E: Tensor) -> LayerHealth:
    """Figures of one layer.

    Raises:  ShapeMismatch: no counts at all, or a bias of another length.
    """
    counts = counts_E.detach().to("cpu", torch.float64)
    total, experts = float(counts.sum()), counts.numel()
    if total <= 0 or expert_bias_E.shape != counts_E.shape:
        raise ShapeMismatch(
            "router health needs the counts of at least one token, and a bias for each expert",
            expected=f"counts [{experts}] with a positive sum, bias [{experts}]",
            found=f"sum {total:g}, bias {list(expert_bias_E.shape)}",
        )
    load, mean = counts / total, total / experts
    histogram = tuple(
        int(((counts >= low * mean) & (counts < high * mean)).sum()) for low, high in pairwise(LOAD_EDGES)
    )
    return LayerHealth(
        entropy=float(-torch.xlogy(load, load).sum()),
        cv_percent=100 * float(counts.std(correction=0)) / mean,
        max_load_percent=100 * float(load.max()),
        dead_percent=100 * float((counts == 0).double().mean()),
        bias_min=float(expert_bias_E.min()),
        bias_max=float(expert_bias_E.max()),
        load_histogram=histogram,
    )


def router_health(student: Student, counts: Mapping[int, Tensor]) -> dict[int, LayerHealth]:
    """Figures of every MoE layer, by layer number.

    Args:    counts: tokens per expert by layer number, as `added_counts` gives them.
    """
    biases = {
        layer.number: layer.mlp.router.expert_bias
        for layer in student.layers
        if isinstance(layer.mlp, MixtureOfExperts)
    }
    if not biases:
        return {}
    # All layers in two transfers: asking a GPU layer by layer would stop it as often.
    counts_LE = torch.stack([counts[number] for number in biases]).cpu()
    bias_LE = torch.stack(list(biases.values())).cpu()
    return {number: layer_health(*rows) for number, *rows in zip(biases, counts_LE, bias_LE, strict=True)}


def added_counts(passes: Iterable[Mapping[int, Routing]]) -> dict[int, Tensor]:
    """Tokens per expert by layer number, added over the `routing` of several passes."""
    total: dict[int, Tensor] = {}
    for routing in passes:
        for number, one in routing.items():
            total[number] = total[number] + one.counts_E if number in total else one.counts_E.clone()
    return total


def balance_loss(routing: Mapping[int, Routing]) -> Tensor:
    """Sum of the layers' weighted sequence losses; carries gradient. A zero without gradient if nothing routed."""
    losses = [one.balance_loss for one in routing.values()]
    return torch.stack(losses).sum() if losses else torch.zeros(())


def worst_health(layers: Mapping[int, LayerHealth]) -> dict[str, float]:
    """The worst figure over all layers: smallest entropy, largest of the others; {} if there is no layer."""
    if not layers:
        return {}
    values = list(layers.values())
    return {
        "entropy_min": min(one.entropy for one in values),
        "cv_percent_max": max(one.cv_percent for one in values),
        "max_load_percent_max": max(one.max_load_percent for one in values),
        "dead_percent_max": max(one.dead_percent for one in values),
        "bias_min": min(one.bias_min for one in values),
        "bias_max": max(one.bias_max for one in values),
    }


def collapsed_layers(
    layers: Mapping[int, LayerHealth], *, max_dead_percent: float, max_load_percent: float
) -> list[int]:
    """Numbers of the layers above either threshold, ascending."""
    return sorted(
        number
        for number, one in layers.items()
        if one.dead_percent > max_dead_percent or one.max_load_percent > max_load_percent
    )


def health_rows(layers: Mapping[int, LayerHealth]) -> list[dict[str, Any]]:
    """One JSON row a layer, for a plot: its number and all figures."""
    return [{"layer": number, **asdict(one)} for number, one in sorted(layers.items())]
