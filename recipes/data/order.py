"""Orders of documents and of packed rows that nothing but a few numbers decides.

Place in the path: indexed datasets -> **order** -> packing, packed_rows.

Invariants: the same on every machine and with every version of every library, which a library's own generator does not
promise; a permutation for every seed, epoch and block.

Example:
    >>> sorted(document_order(4, seed=0, epoch=0).tolist())
    [0, 1, 2, 3]
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def document_order(documents: int, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """A permutation of the documents that only (seed, epoch) decide, whatever the version of any library.

    Returns: document numbers, sorted by a 64-bit mix of seed, epoch and number; the lower number first on a tie.
    Source:  the finalizer of SplitMix64 (Steele, Lea and Flood 2014).
    """
    return _drawn(documents, seed, epoch)


def row_order(rows: int, *, seed: int, epoch: int, block: int) -> npt.NDArray[np.int64]:
    """A permutation of the rows of one packed block that only (seed, epoch, block) decide, as `document_order`."""
    return _drawn(rows, seed, epoch, block)


def _drawn(count: int, seed: int, *numbers: int) -> npt.NDArray[np.int64]:
    key = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64))
    for number in numbers:
        key = _mix(key + np.uint64(number))
    return np.argsort(_mix(key ^ np.arange(count, dtype=np.uint64)), kind="stable")


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    mixed = values + np.uint64(0x9E3779B97F4A7C15)  # arrays wrap modulo 2**64 without a warning
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
