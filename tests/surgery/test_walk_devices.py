"""The walks compute where their rows lie: each tensor they make names its device, a GPU gives what the CPU gives."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import convert_pico
import pytest
import torch
from surgery_pico import Built, Workshop, build, pico_config, random_tensors
from test_moe_recipe import params as moe_params
from test_morph_recipe import PARENT, params
from torch.overrides import TorchFunctionMode

from recipes import convert_dense, morph_real, runtime, upcycle_moe
from recipes.recipe import Context
from recipes.tensors import write_safetensors

ROOT = Path(__file__).resolve().parents[2]
PLACES = tuple(str(ROOT / "recipes" / name) for name in ("model", "ops"))
FACTORIES = {
    getattr(torch, name)
    for name in ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "tensor", "zeros")
}


class Watch(TorchFunctionMode):
    """Notes each tensor that the walks' modules make without saying where."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.homeless: set[str] = set()

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        if function in FACTORIES:
            caller = sys._getframe(1)
            if caller.f_code.co_filename.startswith(PLACES):
                self.seen += 1
                if "device" not in keywords:
                    self.homeless.add(f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno}")
        return function(*arguments, **keywords)


@pytest.fixture(scope="module")
def donors(tmp_path_factory: pytest.TempPathFactory) -> convert_pico.Bench:
    return convert_pico.Bench.make(tmp_path_factory.mktemp("devices") / "bench", convert_pico.trained_donor(steps=5))


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop.make(tmp_path_factory.mktemp("devices") / "morph", PARENT, random_tensors(PARENT))


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    config = pico_config(attention="tpa")
    return Workshop.make(tmp_path_factory.mktemp("devices") / "moe", config, random_tensors(config))


def contexts(name: str, request: pytest.FixtureRequest, scratch: str, **changes: Any) -> tuple[ModuleType, Context]:
    match name:
        case "morph":
            return morph_real, request.getfixturevalue("students").context(params(**changes), scratch)
        case "upcycle":
            return upcycle_moe, request.getfixturevalue("grown").context(moe_params(**changes), scratch)
    method = {"fitted": {"ffn_steps": 5}, "pooled": {}}[name]
    chosen = convert_pico.pico_params(method=name, max_loss_over_unigram=1e9, **method, **changes)
    return convert_dense, request.getfixturevalue("donors").context(chosen, f"{name}-{scratch}")


NAMES = ("fitted", "pooled", "morph", "upcycle")
# Where a tensor is made does not depend on how many rows there are.
LITTLE = {"fitted": 512, "pooled": 512, "morph": 200, "upcycle": 400}


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_made_on_a_named_device(name: str, request: pytest.FixtureRequest) -> None:
    recipe, context = contexts(name, request, "watched", calibration_tokens=LITTLE[name])
    done: dict[str, Path] = {}
    with Watch() as watch:
        for step in recipe.intermediates(context):
            path = context.scratch / f"{step.name}.safetensors"
            write_safetensors(path, step.compute(dict(done)))
            done[step.name] = path
    assert watch.seen
    assert watch.homeless == set()


def test_a_tensor_without_a_device_is_noticed() -> None:
    source = "def make(torch): torch.zeros(2), torch.ones(1, device='cpu')"
    place = str(Path(PLACES[0]) / "nowhere.py")
    scope: dict[str, Any] = {}
    exec(compile(source, place, "exec"), scope)
    with Watch() as watch:
        scope["make"](torch)
    assert (watch.seen, watch.homeless) == (2, {"nowhere.py:1"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_gives_what_the_cpu_gives(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        monkeypatch.setenv(runtime.DEVICE_VARIABLE, device)
        recipe, context = contexts(name, request, device)
        found[device] = build(recipe, context)
    assert figures(found["cuda"]) == pytest.approx(figures(found["cpu"]), rel=0.02, abs=0.02)
    if name != "fitted":  # there one other neuron of two that are as good makes another matrix
        assert largest_gap(found["cpu"], found["cuda"]) < 0.05


def figures(built: Built) -> dict[str, float]:
    """What the recipe measured; of fits of sixteen pairs, what they were fitted to, as the rest hangs on near ties."""
    layers = built.plan.report.plots.get("layers", []) if built.plan.report is not None else []
    if layers and "ffn_fit_r2_pairs" in layers[0]:
        names = ("attention_r2", "ffn_fit_r2_pairs", "key_energy_lost", "value_energy_lost")
        return {f"{row['layer']}/{name}": row[name] for row in layers for name in names}
    reports = [report.metrics for report in (built.plan.report, built.report) if report is not None]
    return dict(row for metrics in reports for row in numbers(metrics, ""))


def numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{name}/{key}")
    elif isinstance(value, (int, float)):
        yield name, float(value)


def largest_gap(one: Built, other: Built) -> float:
    """The relative difference of the two tensors that are farthest apart."""
    pairs = [(one.staged.read(name).double(), other.staged.read(name).double()) for name in one.staged.names()]
    return max(float((a - b).norm() / a.norm().clamp(min=1e-9)) for a, b in pairs)
