"""Knobs of `recipes.wake_up`.

Place in the path: **config** -> recipe.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from recipes.params.base import ParamsBase
from recipes.params.training import GateParams, TrainingParams


class Params(ParamsBase):
    """Two phases of one run: the inserted layers alone, then all weights.

    new_layers empty: those that the parent's `expansion.json` names.
    """

    train: TrainingParams  # steps of both phases together
    new_layers_steps: int = Field(ge=0)  # of them, steps of the first phase
    second_warmup_steps: int = Field(ge=0)  # the rate rises again from 0 when the old weights join
    new_layers: tuple[int, ...] = ()  # 1-based
    gates: GateParams

    @model_validator(mode="after")
    def _phases(self) -> Params:
        if self.new_layers_steps + self.second_warmup_steps > self.train.steps:
            raise ValueError(f"{self.train.steps} steps are too few for both phases")
        return self
