"""Which tensors a spot check computes again.

Place in the path: tensor tables -> **here** -> the runner. A seed makes the choice repeatable; without one it is drawn
fresh each time, so that nobody who forges an artifact knows which tensors will be looked at.
Invariants: the same seed and artifact give the same tensors; every shard is visited before one is visited twice; within
a shard, and among shards, large ones tend to come first, by the root of their size: large ones prove more bytes, but
small ones are where a forger would go if they were never looked at.

Example:
    names = choose(tables, count=20, seed=7)
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from vpstore.schema.digest import Digest
from vpstore.schema.tensor_table import TensorRow, TensorTable


def choose(tables: Mapping[str, TensorTable], *, count: int, seed: int) -> tuple[str, ...]:
    """Choose tensors of an artifact.

    Args:    tables: by shard; count: how many, or all there are if that is less.
    Returns: names, in the order in which they were chosen.
    """
    queues = [sorted(table.tensors, key=lambda row: _turn(seed, row)) for _, table in sorted(tables.items())]
    rounds = ((place, _turn(seed, row), row.name) for queue in queues for place, row in enumerate(queue))
    return tuple(name for _, _, name in sorted(rounds)[:count])


def _turn(seed: int, row: TensorRow) -> float:
    """When a tensor's turn comes: the first arrival of a random process whose rate is the root of the tensor's size."""
    drawn = int(Digest.of(f"{seed}\0{row.name}".encode()).hex[:14], 16)
    return -math.log((drawn + 1) / (1 << 56)) / math.sqrt(max(row.end - row.begin, 1))
