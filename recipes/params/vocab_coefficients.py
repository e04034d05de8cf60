"""Params of the recipe `vocab_coefficients`.

Place in the path: **config** -> recipe.

Example:
    >>> Params.model_json_schema()["title"]
    'Params'
"""

from __future__ import annotations

from pydantic import Field

from recipes.params.base import ParamsBase


class Params(ParamsBase):
    """Which tokens are combined from which, and how exactly."""

    dictionary_size: int = Field(gt=0)  # anchors that OMP may combine, the lowest ids of the new vocabulary first
    calibration_anchors: int = Field(ge=0)  # anchors kept out of the dictionary, for a transplant to measure itself on
    atoms_per_token: int = Field(gt=0)  # k: anchors a row is combined from, at most
    unit_atoms: bool  # choose by angle (textbook) instead of by inner product (tokensurgeon)
    rows_per_chunk: int = Field(gt=0)  # rows an intermediate holds: what an interruption can cost
    control_by_omp: tuple[str, ...]  # control tokens combined like ordinary ones
    numbers_by_omp: bool  # two- and three-digit numbers too; otherwise a transplant composes them
    max_mean_residual: float = Field(gt=0, le=1)  # gate: mean |row - combination| / |row| in the reference's space
