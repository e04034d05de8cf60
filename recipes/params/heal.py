"""Knobs of `recipes.heal`.

Place in the path: **config** -> recipe.
"""

from __future__ import annotations

from recipes.params.base import ParamsBase
from recipes.params.training import GateParams, TrainingParams


class Params(ParamsBase):
    """A short training run over all weights, and what it must reach."""

    train: TrainingParams
    gates: GateParams
