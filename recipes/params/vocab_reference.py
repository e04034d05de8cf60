"""Knobs of the vocabulary reference.

Place in the path: **config** -> recipe.
"""

from __future__ import annotations

from pydantic import Field

from recipes.params.base import ParamsBase


class Params(ParamsBase):
    """dimension: columns of both matrices. row_norm: Euclidean length of every row. seed: names both random tables."""

    dimension: int = Field(gt=0, multiple_of=8)
    row_norm: float = Field(gt=0)
    seed: int
