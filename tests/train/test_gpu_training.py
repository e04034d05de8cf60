"""Whole runs on a GPU: the same bits twice, and after a kill; captured passes give what uncaptured ones give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_pico import params_table, pico_config, pico_moe, write_data

from recipes.data.batches import AlignedDataset
from recipes.model.config import StudentConfig
from recipes.model.transformer import Student
from recipes.params.heal import Params
from recipes.train.loop import Phase, Scratch, Trainer
from recipes.train.micro_batch import MicroBatch
from recipes.train.passes import Found, Passes
from recipes.train.state import Identity
from vpstore.errors import RecipeRefused

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DENSE = pico_config(hidden_size=64)
MODELS = {"dense": DENSE, "experts": pico_config(hidden_size=64, moe=pico_moe().moe)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture(autouse=True)
def deterministic() -> Any:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def trainer(data: Path, folder: Path, config: StudentConfig, *, phases: Any = None, **train: Any) -> Trainer:
    table = params_table(**{"steps": 8, "precision": "bfloat16", **train})
    params = Params.model_validate_json(json.dumps(table)).train
    model = Student(config)
    model.draw(torch.Generator().manual_seed(1))
    scratch = Scratch(folder, Identity({}, params.model_dump(mode="json")))
    options = {} if phases is None else {"phases": phases}
    return Trainer(model.cuda(), params, AlignedDataset(data, "train"), scratch, **options)


def run(trainer: Trainer, *, until: int | None = None) -> Trainer:
    trainer.on_step = lambda row, figures: trainer.step == until
    trainer.run(lambda *_: None)
    return trainer


def same(one: Trainer, other: Trainer) -> bool:
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    return one.rows == other.rows and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", MODELS)
def test_two_runs_give_the_same_bits(name: str, data: Path, tmp_path: Path) -> None:
    first, second = (run(trainer(data, tmp_path / str(n), MODELS[name])) for n in range(2))
    assert same(first, second)
    assert first.rows[-1]["loss"] < first.rows[0]["loss"]


@pytest.mark.parametrize("name", MODELS)
def test_a_killed_run_goes_on_with_the_same_bits(name: str, data: Path, tmp_path: Path) -> None:
    whole = run(trainer(data, tmp_path / "whole", MODELS[name]))
    begun = run(trainer(data, tmp_path / "killed", MODELS[name]), until=6)
    assert begun.step == 6
    again = trainer(data, tmp_path / "killed", MODELS[name])
    assert again.resume()
    assert again.step < 6
    assert same(run(again), whole)


class Uncaptured(Passes):
    """Every pass as it stands."""

    def __call__(self, sent: MicroBatch) -> Found:
        self._seen = None
        return super().__call__(sent)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_captured_passes_give_the_bits_of_uncaptured_ones(
    name: str, recompute: bool, data: Path, tmp_path: Path
) -> None:
    captured, plain = (
        trainer(data, tmp_path / kind, MODELS[name], recompute=recompute) for kind in ("captured", "plain")
    )
    plain.passes = Uncaptured(plain.model, plain.numerics)
    assert same(run(captured), run(plain))


@pytest.mark.parametrize("name", MODELS)
def test_recomputed_activations_give_the_same_bits(name: str, data: Path, tmp_path: Path) -> None:
    kept, again = (trainer(data, tmp_path / str(flag), MODELS[name], recompute=flag) for flag in (False, True))
    assert same(run(kept), run(again))


@pytest.mark.parametrize("name", MODELS)
def test_float32_trains_there_too(name: str, data: Path, tmp_path: Path) -> None:
    done = run(trainer(data, tmp_path, MODELS[name], precision="float32"))
    assert done.rows[-1]["loss"] < done.rows[0]["loss"]


def test_what_is_not_trained_keeps_its_bits_and_then_moves(data: Path, tmp_path: Path) -> None:
    phases = (Phase("new", 0, lambda name: ".layers.1." in name), Phase("all", 4, lambda name: True))
    one = trainer(data, tmp_path, DENSE, phases=phases)
    before = {name: weight.detach().clone() for name, weight in one.model.named_parameters()}
    run(one, until=4)
    moved = {name for name, weight in one.model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved
    assert all(".layers.1." in name for name in moved)
    run(one)
    assert not torch.equal(one.model.head_weight, before["lm_head.weight"])


def test_a_step_that_does_not_fit_is_refused_with_what_to_set(data: Path, tmp_path: Path) -> None:
    sizes = {"sequence_length": 2048, "sequences": 1 << 14, "micro_sequences": 1 << 14}
    with pytest.raises(RecipeRefused, match="too little memory") as refused:
        trainer(data, tmp_path, DENSE, loss={"kind": "plain", "chunk": 1 << 20}, **sizes)
    assert "micro_sequences" in refused.value.next_step
    assert "GiB" in refused.value.expected


def test_a_run_leaves_weights_and_moments_and_nothing_else_on_the_card(data: Path, tmp_path: Path) -> None:
    before = torch.cuda.memory_allocated()
    one = run(trainer(data, tmp_path, DENSE))
    kept = [*one.model.state_dict().values(), *one.optimizer.saved()[0].values()]
    held = sum(tensor.numel() * tensor.element_size() for tensor in kept)
    assert torch.cuda.memory_allocated() - before < 1.1 * held + (1 << 20)
