"""What a surgery takes of memory and of disk, from shapes alone: told before hours of work, not after them.

Place in the path: recipe -> **needs** -> whoever builds, who says it and refuses a disk that is too full.

Invariants: estimates from above; nothing is read but configs and headers. Tests hold them against what processes take.

Example:
    >>> needs(12_000_000_000, host=411_828_224).disk_bytes
    12000000000
"""

from __future__ import annotations

from recipes import runtime
from recipes.recipe import Needs

_MIB = 1 << 20
_PROCESS = {"cpu": 350 * _MIB, "cuda": 1400 * _MIB}  # Python with torch, and with a GPU's libraries in use
_PIECES = 600 * _MIB  # of tensors that threads make beside each other: some 36 MiB each, at most 16 of them


def needs(disk_bytes: int, *, host: int = 0, device: int = 0) -> Needs:
    """Bytes on the disk, and what is held at the peak by the host, and by the device that computes: maybe the host."""
    place = runtime.device()
    return Needs(disk_bytes, _PROCESS[place] + _PIECES + host + (device if place == "cpu" else 0))
