"""Params of the recipe `morph_real`.

Place in the path: **config** -> recipe.

Example:
    >>> Params.model_json_schema()["title"]
    'Params'
"""

from __future__ import annotations

from pydantic import Field

from recipes.model.config import StudentConfig
from recipes.params.base import ParamsBase


class Params(ParamsBase):
    """What the layers are fitted on, how, and what must hold."""

    model: StudentConfig  # real mode; all but `attention` must be the parent's
    calibration_tokens: int = Field(gt=0)  # of the training text; the fits
    probe_tokens: int = Field(gt=0)  # of the held-out text; every figure that is reported
    sequence_length: int = Field(gt=0)
    ridge: float = Field(gt=0)  # relative to the mean diagonal of each least squares system
    query_sweeps: int = Field(ge=0)  # rounds of alternating least squares on the query factors
    damping: float = Field(ge=0, le=1)  # share of the stream's drift that each output projection is asked to undo
    plane_floor: float = Field(gt=0, le=1)  # smallest magnitude of a rotary plane's gain on global layers
    max_loss_increase: float  # nats a token on held-out text, real over compat
    max_flipped_share: float = Field(ge=0, le=1)  # probe tokens of any layer whose keys change sign, c(x) <= 0
