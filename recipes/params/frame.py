"""What stands before the user's words, in the params of every data set with conversations.

Place in the path: **config** -> recipe.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from recipes.params.base import ParamsBase


class FrameParams(ParamsBase):
    """What stands before the user's words in every conversation: see `recipes.data.conversation.Frame`."""

    model_identity: str = Field(min_length=1)
    reasoning: Literal["Low", "Medium", "High"]
    date: str = Field(pattern=r"\d{4}-\d{2}-\d{2}")
    knowledge_cutoff: str = Field(pattern=r"\d{4}-\d{2}")
    instructions: str = Field(min_length=1)
