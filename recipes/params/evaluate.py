"""Knobs of `recipes.evaluate`.

Place in the path: **config** -> recipe.
"""

from __future__ import annotations

from pydantic import Field

from recipes.params.base import ParamsBase


class Params(ParamsBase):
    """What is read and asked. Sizes are in bytes, so that every tokenizer is measured on the same text."""

    total_bytes: int = Field(gt=0)  # of held-out prose, about 4 bytes a token
    max_bytes_per_document: int = Field(gt=0)  # cut at a character's border
    three_digit_stride: int = Field(gt=0)  # 1: all numbers from 000 to 999
    chunk: int = Field(gt=0)  # tokens whose scores are made at a time
