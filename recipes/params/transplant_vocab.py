"""Params of the recipe `transplant_vocab`.

Place in the path: **config** -> recipe.

Example:
    >>> Params.model_json_schema()["title"]
    'Params'
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from recipes.params.base import ParamsBase


class Params(ParamsBase):
    """How the rows of the new vocabulary are made from the donor's."""

    dictionary_size: int = Field(gt=0)  # anchors that OMP may combine, the lowest ids of the new vocabulary first
    transfer: Literal["calibrated", "plain"]  # plain: mergekit-tokensurgeon's; see recipes.ops.transfer
    calibration_anchors: int = Field(ge=0)  # anchors kept out of the dictionary, on which the transfer is measured
    atoms_per_token: int = Field(gt=0)  # k: anchors a row is combined from, at most
    unit_atoms: bool  # choose by angle (textbook) instead of by inner product (tokensurgeon)
    rows_per_chunk: int = Field(gt=0)  # rows an intermediate holds: what an interruption can cost
    control_tokens: dict[str, str]  # control token of the new vocabulary -> token of the donor whose row it gets
    control_by_omp: tuple[str, ...]  # control tokens combined like ordinary ones; every other one gets the mean row
    numbers: Literal["composed", "omp"]  # how the two- and three-digit numbers are made
    number_decay: float = Field(ge=0, lt=1)  # weight of each further digit against the one before it
    number_seed: int  # of the sign patterns that bind a digit to its place
    max_mean_residual: float = Field(gt=0, le=1)  # gate: mean |row - combination| / |row| in the reference's space
