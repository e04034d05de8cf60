"""Heal a checkpoint after surgery: a short real training run over all weights, gated.

Place in the path: config -> **recipe**. Serves compat mode, real mode and the first steps of the mixture alike: the
architecture comes from the parent's config.json; layers with experts get their balance loss and bias updates.

Invariants: interrupted and resumed, it gives the bits of an uninterrupted run; nothing that misses a gate is written.

Example:
    stage vpDense0-5_28@compat-heal, inputs parent = …@convert, data = healing_text, tokenizer = o200k-harmony
"""

from __future__ import annotations

from recipes.params.heal import Params
from recipes.recipe import Context, RunResult
from recipes.train.loop import ALL_WEIGHTS
from recipes.train.stage import train_stage


def run(context: Context) -> RunResult:
    """Train all weights.

    Raises:  GateMissed: with the figures; the training state is kept. RecipeRefused: an input that does not fit.
    """
    params: Params = context.params
    return train_stage(context, params.train, params.gates, phases=(ALL_WEIGHTS,))
