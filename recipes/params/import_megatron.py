"""Knobs of the way back from Megatron.

Place in the path: **config** -> recipe.
"""

from __future__ import annotations

from pydantic import Field

from recipes.params.base import ParamsBase


class Params(ParamsBase):
    """max_loss_rise: nats that the loss of the fixed tokens may lie above the parent's.

    A wrong order of q, k and v raises it by 1.7 and more; training on other text by a fraction of that.
    """

    max_loss_rise: float = Field(gt=0)
