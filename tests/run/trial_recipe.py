"""A small recipe whose sizes, figures and faults are params, for the tests of recipes/execute.py."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from recipes.names import layer_tensor
from recipes.params.base import ParamsBase
from recipes.planned import PlannedTensor
from recipes.recipe import Context, Gate, Intermediate, Plan, Report, json_file
from recipes.tensors import TensorReader

# The params of a recipe are found by its name: this one brings its own.
sys.modules[f"recipes.params.{__name__}"] = sys.modules[__name__]

BAD = 2  # the layer at which a fault shows


class Params(ParamsBase):
    """How much there is, and what is wrong with it."""

    count: int = 4  # tensors, one a layer
    elements: int = 8  # of each, four bytes each
    fault: str = ""
    gates: tuple[
        tuple[str, float | None, str, float], ...
    ] = ()  # name, value (a string is parsed), relation, threshold
    file: str = "notes.json"
    steps: tuple[str, ...] = ("base",)


def tensor_name(number: int) -> str:
    return layer_tensor(number, "mlp.fc1.bias")


def values(number: int, elements: int) -> Tensor:
    return torch.arange(elements, dtype=torch.float32).remainder_(1000.0).add_(float(number))


def _note(context: Context, name: str) -> None:
    with (context.scratch / "computed.log").open("a", encoding="utf-8") as log:
        log.write(f"{os.getpid()} {name}\n")


def _compute(context: Context, number: int) -> Tensor:
    params: Params = context.params
    _note(context, tensor_name(number))
    if params.fault == "slow":
        time.sleep(600)
    made = values(number, params.elements)
    if number != BAD:
        return made
    if params.fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    faulty = {"nan": made.log().mul(0.0).div(0.0), "infinite": made / 0.0, "shape": made[1:], "dtype": made.bfloat16()}
    return faulty.get(params.fault, made)


def _base(context: Context, step: str, done: Any) -> dict[str, Tensor]:
    _note(context, step)
    return {step: torch.full((3,), float(len(done)))}


def intermediates(context: Context) -> list[Intermediate]:
    return [Intermediate(step, partial(_base, context, step)) for step in context.params.steps]


def plan(context: Context) -> Plan:
    params: Params = context.params
    numbers = range(1, params.count + 1)
    shape = (params.elements,)
    tensors = [PlannedTensor(tensor_name(n), "F32", shape, partial(_compute, context, n)) for n in numbers]
    if params.fault == "hoard":
        held = [values(n, params.elements) for n in numbers]
        tensors = [replace(t, compute=partial(held.__getitem__, n)) for n, t in enumerate(tensors)]
    if params.fault == "tensor twice":
        tensors.append(tensors[BAD - 1])
    report = Report({"planned": params.count}, plots={"sizes": [{"layer": n, "elements": shape[0]} for n in numbers]})
    return Plan(tensors, [json_file(params.file, {"count": params.count})], report)


def check(context: Context, staged: TensorReader) -> Report:
    params: Params = context.params
    gates = [Gate(name, value, relation, threshold) for name, value, relation, threshold in params.gates]  # type: ignore[arg-type]
    largest = float(staged.read(tensor_name(params.count)).max())
    if params.fault == "nan figure":
        largest = float("nan")
    if params.fault == "nan gate":
        gates.append(Gate("undefined", float("nan"), "<=", 1.0))
    if params.fault == "plot twice":
        return Report({"largest": largest}, gates, {"sizes": []})
    return Report({"largest": largest}, gates, {"curve": [{"x": 1, "y": largest}]})
