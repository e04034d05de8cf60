"""The processes that train one model together, and sums over them.

Place in the path: launch -> **ranks** -> loop. A process that was started alone is rank 0 of 1; its sums are its own.

Invariants: what a sum gives is the same on every rank; a table of rows is put together in the order of ranks, so sums
over it are made in the order in which one process would make them.

Example:
    ranks = ranks_here()
    counts_E = ranks.added(counts_E)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vpstore.errors import RecipeRefused

_BUCKET = 1 << 25  # elements that are summed in one message


class Ranks(NamedTuple):
    """Which process this is, of how many."""

    rank: int
    world: int

    @property
    def is_first(self) -> bool:
        """Whether this process writes what one process writes."""
        return self.rank == 0

    def added(self, x: Tensor) -> Tensor:
        """The sum over all ranks; `x` itself if there is one."""
        if self.world > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def added_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums of equally shaped tensors over all ranks, in one message."""
        if self.world == 1 or not tensors:
            return list(tensors)
        return list(self.added(torch.stack(list(tensors))).unbind())

    def add_in_place(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over all ranks, where it lies; many small ones go in one message."""
        if self.world == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            for tensor, part in zip(bucket, torch.split(flat, [one.numel() for one in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def stacked(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, those of rank 0 first; every rank has as many."""
        if self.world == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.world)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def require_same(self, what: str, value: str) -> None:
        """Hold that every rank was given the same.

        Raises:  RecipeRefused: on every rank, if one was not.
        """
        if self.world == 1:
            return
        found: list[str] = [""] * self.world
        dist.all_gather_object(found, value)
        if len(set(found)) > 1:
            different = [rank for rank, one in enumerate(found) if one != found[0]]
            raise RecipeRefused(
                "the ranks of a training do not agree",
                where=what,
                expected="the same on every rank",
                found=f"another on rank {', '.join(map(str, different))} than on rank 0",
                next_step="start all ranks from one build",
            )

    def note(self, record: dict[str, Any], step: int) -> None:
        """Write down, in what a run keeps, from which step on there were how many ranks."""
        history = record.setdefault("ranks", [])
        if not history or history[-1]["ranks"] != self.world:
            history.append({"from_step": step, "ranks": self.world})

    def wait(self) -> None:
        """Until every rank has come here."""
        if self.world > 1:
            dist.barrier()


ALONE = Ranks(0, 1)


def ranks_here() -> Ranks:
    """Of the process group, if there is one."""
    if dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return ALONE


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one dtype together, up to `_BUCKET` elements."""
    found: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        is_alike = bool(found) and found[-1][0].dtype == tensor.dtype
        if not is_alike or size + tensor.numel() > _BUCKET:
            found.append([])
            size = 0
        found[-1].append(tensor)
        size += tensor.numel()
    return found
