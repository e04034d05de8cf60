"""A small training recipe (one that has `run`), for the tests of recipes/execute.py."""

from __future__ import annotations

import sys

import torch

from recipes.names import FINAL_NORM
from recipes.params.base import ParamsBase
from recipes.recipe import Context, Gate, Report, RunResult, json_file

# The params of a recipe are found by its name: this one brings its own.
sys.modules[f"recipes.params.{__name__}"] = sys.modules[__name__]


class Params(ParamsBase):
    """What the training comes to."""

    value: float
    dtype: str = "float32"
    loss: float = 1.0


def run(context: Context) -> RunResult:
    params: Params = context.params
    weight = torch.full((4,), params.value, dtype=torch.float64).to(getattr(torch, params.dtype))
    report = Report({"loss": params.loss}, [Gate("loss", params.loss, "<=", 2.0)])
    return RunResult({FINAL_NORM: weight}, [json_file("config.json", {})], report)
