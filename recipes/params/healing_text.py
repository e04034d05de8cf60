"""Knobs of the healing data.

Place in the path: **config** -> recipe.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from recipes.params.base import ParamsBase
from recipes.params.frame import FrameParams


class Params(ParamsBase):
    """Sizes in tokens of o200k.

    train_tokens, valid_tokens: what each split holds at most. harmony_share: of them, in conversations.
    max_document_tokens: longer prose is cut, a longer conversation is dropped; both are counted.
    held_out_fraction: of the prose, by doc_id; synth_held_out_fraction: of the rows, by synth_id.
    nul_policy: what to do with text that contains NUL: drop it, remove the characters, or refuse the corpus.
    """

    train_tokens: int = Field(gt=0)
    valid_tokens: int = Field(gt=0)
    harmony_share: float = Field(ge=0.10, le=0.30)
    max_document_tokens: int = Field(gt=1)
    held_out_fraction: float = Field(gt=0, lt=1)
    synth_held_out_fraction: float = Field(gt=0, lt=1)
    nul_policy: Literal["drop", "remove", "refuse"]
    frame: FrameParams
