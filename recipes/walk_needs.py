"""What a walk through a student's layers takes of memory, and a student of disk.

Place in the path: needs -> **walk_needs** -> the recipes that write a student. Apart from `needs`, so that a recipe
without a student does not depend on the model's code.

Invariants: as of `needs`.

Example:
    >>> student_needs(config, walked=4096, streams=4).disk_bytes
    12045150030
"""

from __future__ import annotations

from math import prod

from recipes.checkpoint import expected_tensors
from recipes.model.config import StudentConfig
from recipes.names import split_layer
from recipes.needs import needs
from recipes.planned import WIDTHS
from recipes.recipe import Needs

_FLOAT = 4  # bytes


def checkpoint_bytes(config: StudentConfig) -> int:
    """All tensors of a checkpoint."""
    return sum(WIDTHS[dtype] * prod(shape) for dtype, shape in expected_tensors(config).values())


def student_needs(config: StudentConfig, *, walked: int, streams: int, disk_bytes: int = 0) -> Needs:
    """Of a step that writes a student, and walks layers one by one.

    Args:    walked: tokens of the walk. streams: numbers of the stream's width that are held for each of them.
             disk_bytes: of intermediates.
    """
    table = WIDTHS["BF16"] * config.vocab_size * config.hidden_size
    layers: dict[int, int] = {}
    for name, (dtype, shape) in expected_tensors(config).items():
        place = split_layer(name)
        if place is not None:
            layers[place[0]] = layers.get(place[0], 0) + WIDTHS[dtype] * prod(shape)
    # Both are read as they are stored; what computes holds them in float32.
    largest = table + max(layers.values())
    held = 2 * largest + _FLOAT * streams * walked * config.hidden_size
    return needs(checkpoint_bytes(config) + disk_bytes, host=largest, device=held)
