"""Wake the layers that depth expansion inserted: they train first, alone; then all weights.

Place in the path: config -> **recipe**. Which layers are new stands in the parent's `expansion.json`, or in the params.

Invariants: in the first phase no old weight changes by a bit; the rate rises from 0 at the start of both phases, since
an orthogonalised update of a zero matrix has full size at its first step.

Example:
    stage vpDense@wake-up, inputs parent = vpDense@expand, data = healing_text, tokenizer = o200k-harmony
"""

from __future__ import annotations

from recipes.names import split_layer
from recipes.params.wake_up import Params
from recipes.recipe import Context, RunResult
from recipes.train.loop import Phase
from recipes.train.stage import train_stage
from vpstore.errors import RecipeRefused

EXPANSION = "expansion.json"


def run(context: Context) -> RunResult:
    """Train the new layers, then everything.

    Raises:  GateMissed: with the figures; the training state is kept. RecipeRefused: an input that does not fit.
    """
    params: Params = context.params
    phases = wake_up_phases(frozenset(new_layers(context)), params)
    return train_stage(context, params.train, params.gates, phases=phases)


def new_layers(context: Context) -> tuple[int, ...]:
    """1-based numbers of the inserted layers.

    Raises:  RecipeRefused: neither the params nor the parent say which they are.
    """
    params: Params = context.params
    parent = context.inputs["parent"]
    if params.new_layers:
        return params.new_layers
    if not (parent.path / EXPANSION).is_file():
        raise RecipeRefused(
            "nobody says which layers are new",
            where=f"parent {parent.ref}",
            expected=f"{EXPANSION} in the parent, or new_layers in the params",
            next_step="take a parent that expand_depth built, or list the layers in the TOML",
        )
    return tuple(int(layer) for layer in parent.json(EXPANSION)["inserted"])


def wake_up_phases(layers: frozenset[int], params: Params) -> tuple[Phase, ...]:
    """The two phases of a run."""

    def is_new(name: str) -> bool:
        place = split_layer(name)
        return place is not None and place[0] in layers

    everything = Phase("all", params.new_layers_steps, lambda name: True, params.second_warmup_steps)
    return (Phase("new_layers", 0, is_new), everything) if params.new_layers_steps else (everything,)
