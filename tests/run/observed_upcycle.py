"""The real recipe upcycle_moe, with a line in scratch/computed.log for everything that it computes.

Tests count in that log what was computed again; OBSERVED_PAUSE (seconds a tensor) leaves time to kill a build halfway.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from recipes import upcycle_moe
from recipes.params.upcycle_moe import Params
from recipes.recipe import Context, Intermediate, Plan
from recipes.upcycle_moe import check

__all__ = ["Params", "check", "intermediates", "plan"]

# The params of a recipe are found by its name: this one brings its own.
sys.modules[f"recipes.params.{__name__}"] = sys.modules[__name__]

LOG = "computed.log"


def note(context: Context, name: str) -> None:
    """Say who computes what, in one write, so that several processes can share the file."""
    with (context.scratch / LOG).open("a", encoding="utf-8") as log:
        log.write(f"{os.getpid()} {name}\n")


def _tensor(context: Context, name: str, compute: Callable[[], Any]) -> Any:
    note(context, name)
    time.sleep(float(os.environ.get("OBSERVED_PAUSE", "0")))
    return compute()


def _intermediate(context: Context, step: Intermediate, done: Mapping[str, Path]) -> Any:
    note(context, step.name)
    return step.compute(done)


def intermediates(context: Context) -> Sequence[Intermediate]:
    steps = upcycle_moe.intermediates(context)
    return [Intermediate(step.name, partial(_intermediate, context, step)) for step in steps]


def plan(context: Context) -> Plan:
    made = upcycle_moe.plan(context)
    observed = [replace(t, compute=partial(_tensor, context, t.name, t.compute), rows=None) for t in made.tensors]
    return replace(made, tensors=observed)
