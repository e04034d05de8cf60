"""Params of the recipe `convert_dense`.

Place in the path: **config** -> recipe.

Example:
    >>> Params.model_json_schema()["title"]
    'Params'
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from recipes.model.config import StudentConfig
from recipes.params.base import ParamsBase


class Params(ParamsBase):
    """The student's shape, the calibration, and the knobs of the fits."""

    model: StudentConfig
    method: Literal["fitted", "pooled"]  # pooled: the baseline, means and selected rows without any fit
    sequence_length: int = Field(gt=0)
    calibration_tokens: int = Field(gt=0)  # of the training part: what the fits see
    probe_tokens: int = Field(gt=0)  # of the held-out part: what the figures are measured on
    ridge: float = Field(gt=0)  # in units of the inputs' mean variance
    drift: float = Field(ge=0, le=1)  # share of the streams' difference that each fit is asked to make up for
    token_limit: float = Field(gt=0)  # a token's energy, in medians, above which it counts no more
    value_residual: float  # logit of lambda in layers > 1
    pair_scale: float = Field(gt=0)  # s in units of std(gate) / std(up)
    ffn_steps: int = Field(ge=0)  # local Adam steps a layer
    ffn_step_tokens: int = Field(gt=0)
    ffn_learning_rate: float = Field(gt=0)
    seed: int  # of the order of those steps
    max_loss_over_unigram: float = Field(gt=0)  # gate: held-out loss, in units of a unigram model's
