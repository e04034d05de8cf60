"""Knobs of the tokenizer recipe.

Place in the path: **config** -> recipe.
"""

from __future__ import annotations

from pydantic import Field

from recipes.params.base import ParamsBase


class Params(ParamsBase):
    """padded_vocab: rows of every embedding over this vocabulary. sample_documents: size of the equality gate."""

    padded_vocab: int = Field(gt=0)
    sample_documents: int = Field(gt=0)
