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

    transfer: Literal["calibrated", "plain"]  # plain: mergekit-tokensurgeon's; see recipes.ops.transfer
    control_tokens: dict[str, str]  # control token of the new vocabulary -> token of the donor whose row it gets
    number_decay: float = Field(ge=0, lt=1)  # weight of each further digit against the one before it
    number_seed: int  # of the sign patterns that bind a digit to its place
