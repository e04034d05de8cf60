"""What one step adds up: over micro-batches, over processes, over layers.

Place in the path: micro-batches -> **step_figures** -> loop, logs.

Invariants: sums and counts are reduced over the global batch before anything is divided, so no mean depends on how the
batch was cut; sums stay on the device, in float64, until `settle`, and tensors by layer until somebody asks: a GPU is
stopped once a step, not once a micro-batch.

Example:
    figures = StepFigures.of(batch, shares)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from recipes.data.batches import Batch
from recipes.model.routing import Routing
from recipes.train.losses import SPANS
from recipes.train.ranks import ALONE, Ranks

Row = dict[str, Any]


def span_counts(batch: Batch) -> tuple[int, ...]:
    """Counted tokens of each span."""
    counted_BT = batch.loss_mask_BT > 0
    return tuple(int((counted_BT & (batch.span_BT == span)).sum()) for span in range(len(SPANS)))


def added(counts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Counts of several processes as those of the global batch."""
    return tuple(map(sum, zip(*counts, strict=True)))


@dataclass
class StepFigures:
    """Sums over the micro-batches of one step."""

    counts: tuple[int, ...]  # counted tokens by span
    tokens: int = 0  # without padding, whether they count or not
    places: int = 0  # with padding
    loss: float = 0.0
    balance: float = 0.0
    nll: tuple[float, ...] = (0.0,) * len(SPANS)
    expert_counts: Mapping[int, Tensor] | None = None
    _parts: list[Tensor] = field(default_factory=list)  # one row a micro-batch: objective, balance, losses by span
    layer_balance: dict[int, Tensor] = field(default_factory=dict)  # weighted sequence loss by layer number
    layer_score_entropy: dict[int, Tensor] = field(default_factory=dict)  # nats, mean over tokens

    @classmethod
    def of(cls, batch: Batch, shares: Sequence[Batch]) -> StepFigures:
        """Counts of a global batch, of which each process has its share."""
        return cls(added([span_counts(share) for share in shares]), batch.tokens, batch.ids_BT.numel())

    def add(self, loss: Tensor, balance: Tensor, nll_N: Tensor, span_N: Tensor) -> None:
        """Add one micro-batch; `settle` makes numbers of it."""
        wide = [loss.detach().double(), balance.detach().to(loss.device, torch.float64, non_blocking=True)]
        sums = [torch.where(span_N == span, nll_N.double(), 0.0).sum() for span in range(len(SPANS))]
        self._parts.append(torch.stack([*wide, *sums]))

    def settle(self, ranks: Ranks = ALONE) -> None:
        """Wait for the device, and take the sums over all micro-batches of all ranks."""
        self._add_layers_of(ranks)
        for loss, balance, *sums in ranks.stacked(torch.stack(self._parts)).tolist():
            self.loss += loss + balance
            self.balance += balance
            self.nll = tuple(old + new for old, new in zip(self.nll, sums, strict=True))
        self._parts.clear()

    def _add_layers_of(self, ranks: Ranks) -> None:
        """Make what the layers said that of all ranks."""
        if self.expert_counts:
            added = ranks.added_all(list(self.expert_counts.values()))
            self.expert_counts = dict(zip(self.expert_counts, added, strict=True))
        for table in (self.layer_balance, self.layer_score_entropy):
            table.update(zip(table, ranks.added_all(list(table.values())), strict=True))

    def add_layers(self, routing: Mapping[int, Routing], *, of_rows: float, of_tokens: float) -> None:
        """Add what the layers with experts say of one micro-batch.

        Args:    of_rows, of_tokens: its share of the global batch's rows, and of its tokens.
        """
        for number, one in routing.items():
            entropy = (self.layer_score_entropy, one.score_entropy, of_tokens)
            for table, value, share in ((self.layer_balance, one.balance_loss, of_rows), entropy):
                table[number] = table.get(number, torch.zeros_like(value)) + value.detach() * share

    def cross_entropies(self) -> Row:
        """Nats a token over all counted tokens and in each span (None: no token), and how many there were."""
        found: Row = {
            "cross_entropy": math.fsum(self.nll) / max(sum(self.counts), 1),
            "counted_tokens": sum(self.counts),
        }
        for name, nll, count in zip(SPANS, self.nll, self.counts, strict=True):
            found[f"cross_entropy_{name}"] = nll / count if count else None
            found[f"tokens_{name}"] = count
        return found
