"""Knobs of the SYNTH data set.

Place in the path: **config** -> recipe.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from recipes.params.base import ParamsBase
from recipes.params.frame import FrameParams


class RendererParams(ParamsBase):
    """Which library renders: stated, so that it is part of the key; another version that is installed is refused."""

    name: Literal["openai-harmony"]
    version: str = Field(pattern=r"\d+\.\d+\.\d+")


class TruncationParams(ParamsBase):
    """Sizes in tokens of o200k: see `recipes.data.truncation.Limits`.

    The floors are at least 4, so that a text that is cut at a character has one left.
    """

    max_tokens: int = Field(gt=0)
    min_analysis_tokens: int = Field(ge=4)
    min_user_tokens: int = Field(ge=4)


class Params(ParamsBase):
    """rows_per_shard: a longer file makes several shards; one shard never holds rows of two files.

    held_out_fraction: of the rows, by synth_id. nul_policy: what to do with a row that contains NUL: drop it, remove
    the characters, or refuse the source. max_dropped_share: the gate on rows that are not used, whatever the reason.
    compared_rows: of each file, how many are rendered by the library too and held against ours.
    """

    rows_per_shard: int = Field(gt=0)
    held_out_fraction: float = Field(gt=0, lt=1)
    nul_policy: Literal["drop", "remove", "refuse"]
    max_dropped_share: float = Field(ge=0, le=1)
    compared_rows: int = Field(gt=0)
    renderer: RendererParams
    truncation: TruncationParams
    frame: FrameParams
