"""How a profile's builds run: its table [runtime].

Place in the path: **config** -> run. `threads` stands in every key; `ranks` in none: it decides rounding only, and is
attested.

Example:
    >>> Runtime(threads=2).ranks
    1
"""

from __future__ import annotations

from pydantic import Field

from recipes.params.base import ParamsBase


class Runtime(ParamsBase):
    """Threads and processes."""

    threads: int = Field(gt=0)  # intra-op: it decides the order of sums, and so bytes
    ranks: int = Field(1, gt=0)  # processes that share the rows of a training
