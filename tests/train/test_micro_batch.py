"""What the device gets of a micro-batch, batches that are made ahead, and what is refused before the first step."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from training_pico import heal_params, pico_config, pico_moe, write_data

from recipes.data.batches import AlignedDataset, Batch
from recipes.model.config import StudentConfig
from recipes.model.transformer import Student
from recipes.train.loop import Scratch, Trainer
from recipes.train.memory import step_memory
from recipes.train.micro_batch import MicroBatch, read_ahead
from recipes.train.stage import require_finite
from recipes.train.state import Identity
from vpstore.errors import RecipeRefused

CPU = torch.device("cpu")


def batch(mask: list[list[int]], *, label: int = 5) -> Batch:
    loss_mask = torch.tensor(mask, dtype=torch.float32)
    ids = torch.arange(loss_mask.numel()).view_as(loss_mask).long()
    labels = torch.full_like(ids, label)
    return Batch(ids, labels, loss_mask, torch.ones_like(ids), torch.zeros_like(ids))


def test_only_counted_places_reach_the_loss_and_get_a_gradient() -> None:
    part = MicroBatch.of(batch([[1, 0, 1], [0, 0, 1]]), CPU)
    hidden = torch.arange(12.0).view(2, 3, 2).requires_grad_()
    rows = part.counted(hidden)
    assert rows.tolist() == [[0, 1], [4, 5], [10, 11]]
    (gradient,) = torch.autograd.grad(rows.sum(), hidden)
    assert gradient.sum(-1).tolist() == [[2, 0, 2], [0, 0, 2]]
    assert len(part.labels_N) == len(part.span_N) == 3


def test_a_batch_of_which_all_counts_is_not_selected_from() -> None:
    part = MicroBatch.of(batch([[1, 1], [1, 1]]), CPU)
    hidden = torch.zeros(2, 2, 3)
    assert part.kept_N is None
    assert part.counted(hidden).data_ptr() == hidden.data_ptr()


def test_a_label_that_counts_must_be_an_id_and_one_that_does_not_may_be_anything() -> None:
    MicroBatch.of(batch([[0, 0]], label=201_000), CPU)
    with pytest.raises(RecipeRefused, match="not an id"):
        MicroBatch.of(batch([[0, 1]], label=201_000), CPU)


def test_reading_ahead_gives_the_same_items_and_stops_with_its_reader() -> None:
    made: list[int] = []

    def endless() -> Iterator[int]:
        while True:
            made.append(len(made))
            yield made[-1]

    ahead = read_ahead(endless(), depth=2)
    assert [next(ahead) for _ in range(5)] == [0, 1, 2, 3, 4]
    ahead.close()
    assert len(made) <= 5 + 2 + 1  # in the queue, and one in the hand
    assert not [one for one in threading.enumerate() if one.name == "read-ahead"]


def test_what_goes_wrong_ahead_is_raised_in_its_place() -> None:
    def breaking() -> Iterator[int]:
        yield 1
        raise RecipeRefused("a shard is damaged")

    ahead = read_ahead(breaking())
    assert next(ahead) == 1
    with pytest.raises(RecipeRefused, match="damaged"):
        next(ahead)


def trainer(data: Path, folder: Path, config: StudentConfig, **train: object) -> Trainer:
    params = heal_params(**train).train
    scratch = Scratch(folder, Identity({}, params.model_dump(mode="json")))
    model = Student(config)
    model.draw(torch.Generator().manual_seed(1))
    return Trainer(model, params, AlignedDataset(data, "train"), scratch)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def test_rows_longer_than_the_models_longest_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeRefused, match="longer than what the model is made for") as refused:
        trainer(data, tmp_path, pico_config(max_sequence=32), sequence_length=64)
    assert "at most 32" in refused.value.expected


def test_a_run_resumed_in_another_precision_is_refused_and_its_state_kept(data: Path, tmp_path: Path) -> None:
    trainer(data, tmp_path, pico_config(), steps=2).save()
    with pytest.raises(RecipeRefused, match="belongs to another run") as refused:
        trainer(data, tmp_path, pico_config(), steps=2, precision="bfloat16").resume()
    assert "precision" in refused.value.where
    assert trainer(data, tmp_path, pico_config(), steps=2).resume()


def test_a_parent_with_a_nan_is_refused_by_name() -> None:
    model = Student(pico_config())
    require_finite(model, where="parent")
    with torch.no_grad():
        model.layers[1].self_attn.o_proj.weight[0, 0] = torch.nan
    with pytest.raises(RecipeRefused, match="not finite") as refused:
        require_finite(model, where="parent")
    assert "model.layers.1.self_attn.o_proj.weight" in refused.value.found


@pytest.mark.slow
def test_bfloat16_trains_on_a_cpu_too_near_float32_and_not_with_it(data: Path, tmp_path: Path) -> None:
    losses = {}
    for precision in ("float32", "bfloat16"):
        run = trainer(data, tmp_path / precision, pico_moe(), steps=3, precision=precision)
        run.run(lambda *_: None)
        losses[precision] = [row["loss"] for row in run.rows]
        assert {weight.dtype for weight in run.model.parameters()} == {torch.float32}
    apart = [abs(one - other) for one, other in zip(*losses.values(), strict=True)]
    assert 0 < max(apart) < 0.05


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_memory_of_a_step_follows_the_knobs_that_the_refusal_names(precision: str) -> None:
    with torch.device("meta"):
        model = Student(pico_config())
    base = heal_params(steps=2, precision=precision, sequences=8, micro_sequences=8).train
    needed = step_memory(model, base)
    assert needed.gradients == 4 * sum(weight.numel() for weight in model.parameters())
    assert needed.optimizer >= needed.gradients
    smaller = {
        "recompute": base.model_copy(update={"recompute": True}),
        "micro_sequences": base.model_copy(update={"micro_sequences": 1}),
        "chunk": base.model_copy(update={"loss": base.loss.model_copy(update={"chunk": 8})}),
    }
    for params in smaller.values():
        assert step_memory(model, params).total < needed.total
