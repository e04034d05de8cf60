"""Random numbers that belong to a tensor's name, so that tensors can be drawn in any order and in any process.

Place in the path: recipe -> **ops**. Pure.
Invariants: the seed of a stream is the first 8 bytes of blake2b over (seed, name); no global generator is read or
moved; values are drawn in float32 on the CPU; a stream that is drawn range by range has the values of one draw.

Example:
    >>> torch.equal(normal((4, 2), seed=7, name="a"), normal((4, 2), seed=7, name="a"))
    True
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_TOGETHER = 16  # torch's CPU generator turns so many uniform values into normal ones at a time


def stream(seed: int, name: str) -> torch.Generator:
    """A CPU generator that only (seed, name) decide.

    Args:    seed: any integer; name: the tensor's name, with a suffix where one tensor needs several streams.
    Returns: a fresh generator at its start.
    """
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    generator = torch.Generator(device="cpu")
    # manual_seed takes a signed 64-bit value; both halves of the range are distinct seeds.
    generator.manual_seed(int.from_bytes(digest, "big", signed=True))
    return generator


def normal(shape: tuple[int, ...], *, seed: int, name: str, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Independent normal values of the stream (seed, name), float32.

    Args:    std: >= 0; 0 gives the mean everywhere.
    Returns: float32 of `shape`.
    """
    return torch.randn(shape, generator=stream(seed, name), dtype=torch.float32).mul_(std).add_(mean)


def row_ranges(shape: Sequence[int], *, values: int) -> list[tuple[int, int]]:
    """Ranges of rows, of about so many values each, that `normal_rows` may be cut at.

    Every range but the last has a multiple of 16 values and the last one at least as many, where there are that many.
    """
    rows, size = shape[0], math.prod(shape[1:])
    together = _TOGETHER // math.gcd(size, _TOGETHER)  # rows that have a multiple of 16 values
    step = max(1, values // max(size, 1) // together) * together
    starts = [start for start in range(0, rows, step) if start == 0 or (rows - start) * size >= _TOGETHER]
    return list(zip(starts, [*starts[1:], rows], strict=True))


def normal_rows(
    shape: Sequence[int], ranges: Sequence[tuple[int, int]], *, draw: tuple[int, str], mean: float, std: float
) -> Iterator[Tensor]:
    """What `normal` gives, range by range: bit for bit the rows of the whole.

    Args:    ranges: all of `row_ranges(shape)`, in order; draw: seed and name of the stream.
    """
    generator = stream(*draw)
    for start, stop in ranges:
        drawn = torch.randn((stop - start, *shape[1:]), generator=generator, dtype=torch.float32)
        yield drawn.mul_(std).add_(mean)


def chosen_units(rows: int, units: int, fraction: float, *, seed: int, name: str) -> Tensor:
    """For each row, a random set of exactly round(fraction * units) units (halves round up).

    Args:    0 <= fraction <= 1.
    Returns: bool [rows, units]; ties between equal draws go to the lowest index.
    """
    count = int(fraction * units + 0.5)
    draws = torch.rand((rows, units), generator=stream(seed, name), dtype=torch.float32)
    order = torch.argsort(draws, dim=1, stable=True)
    chosen = torch.zeros((rows, units), dtype=torch.bool)
    return chosen.scatter_(1, order[:, :count], True)
