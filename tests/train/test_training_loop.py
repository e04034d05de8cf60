"""The loop over a pico student: it learns, its micro-batches do not show, its phases freeze, its logs are complete."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from training_pico import EOD, Workshop, heal_params, pico_config, pico_moe, pico_weights, write_data

from recipes.checkpoint import load_student
from recipes.data.batches import AlignedDataset
from recipes.model.config import StudentConfig
from recipes.model.transformer import Student
from recipes.tensors import TensorReader
from recipes.train.loop import ALL_WEIGHTS, Phase, Scratch, Trainer
from recipes.train.state import Identity


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@cache
def start_weights(config: StudentConfig) -> dict[str, Tensor]:
    """What every training here begins with; trainings have copies."""
    return {name: tensor.float() for name, tensor in pico_weights(config).items()}


def trainer(data: Path, scratch: Path, *, moe: bool = False, phases: Any = (ALL_WEIGHTS,), **train: Any) -> Trainer:
    config = pico_moe() if moe else pico_config()
    model = Student(config)
    model.load_state_dict(start_weights(config))
    params = heal_params(**train).train
    place = Scratch(scratch, Identity({"parent": "blake3:1"}, params.model_dump(mode="json")))
    return Trainer(model, params, AlignedDataset(data, "train"), place, phases=phases)


def quiet(label: str, done: int, total: int) -> None:
    """Nobody watches."""


def test_it_learns_and_logs_every_figure(data: Path, tmp_path: Path) -> None:
    one = trainer(data, tmp_path, steps=6)
    one.run(quiet)
    first, last = one.rows[0], one.rows[-1]
    assert first["cross_entropy"] > 11.5  # ln of the vocabulary: the pico knows nothing
    assert last["cross_entropy"] < first["cross_entropy"] - 1.0
    assert [row["step"] for row in one.rows] == list(range(1, 7))
    assert last["consumed_tokens"] == 6 * 2 * 64
    assert last["consumed_samples"] == 12
    for row in one.rows:
        parts = [(row[f"cross_entropy_{span}"], row[f"tokens_{span}"]) for span in ("plain", "reasoning", "final")]
        assert sum(count for _, count in parts) == row["counted_tokens"] > 0
        total = sum(nats * count for nats, count in parts if nats is not None)
        assert total / row["counted_tokens"] == pytest.approx(row["cross_entropy"])
        assert row["loss"] == pytest.approx(row["cross_entropy"], rel=1e-5)  # plain loss, no experts
        assert {"gradient_norm", "rate_matrix", "rate_embedding", "epoch", "is_spike"} <= row.keys()
    assert first["rate_matrix"] == pytest.approx(0.01)  # half of the peak: warm-up of two steps


def test_span_loss_is_the_sum_of_span_means(data: Path, tmp_path: Path) -> None:
    loss = {"kind": "span", "span_weights": [0.5, 1.0, 2.0], "chunk": 64}
    one = trainer(data, tmp_path, steps=2, sequences=4, loss=loss)
    one.run(quiet)
    for row in one.rows:
        names = (("plain", 0.5), ("reasoning", 1.0), ("final", 2.0))
        want = sum(weight * row[f"cross_entropy_{span}"] for span, weight in names if row[f"tokens_{span}"])
        assert row["loss"] == pytest.approx(want, rel=1e-5)
    assert all(row["tokens_reasoning"] > 0 and row["tokens_final"] > 0 for row in one.rows)


@pytest.mark.slow
def test_micro_batches_change_rounding_only(data: Path, tmp_path: Path) -> None:
    loss = {"kind": "span", "span_weights": [0.0, 1.0, 1.0], "chunk": 64}
    ends = []
    for micro in (1, 4):
        changes = {"steps": 2, "sequences": 4, "micro_sequences": micro, "loss": loss}
        one = trainer(data, tmp_path / str(micro), moe=True, **changes)
        one.run(quiet)
        ends.append((one.rows, one.model.state_dict()))
    for cut, whole in zip(ends[0][0], ends[1][0], strict=True):
        assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-4)
        assert cut["gradient_norm"] == pytest.approx(whole["gradient_norm"], rel=1e-2)
        assert cut["balance_loss"] == pytest.approx(whole["balance_loss"], rel=1e-4)


def test_padding_moves_no_expert_bias_and_no_loss(data: Path, tmp_path: Path) -> None:
    """A row with other ids in its padding trains the same; the control: padding there is, and its ids are read."""
    ends = []
    for pad in (EOD, 20):
        one = trainer(data, tmp_path, moe=True, packing="best_fit", sequences=4, micro_sequences=2)
        batch = next(iter(one.batches()))
        is_padding = batch.documents_BT < 0
        assert is_padding.any()
        batch = replace(batch, ids_BT=batch.ids_BT.masked_fill(is_padding, pad))
        ends.append((one._accumulate(batch), {n: w.grad for n, w in one.model.named_parameters()}))
    (first, gradients), (second, others) = ends
    assert (first.loss, first.balance, first.tokens) == (second.loss, second.balance, second.tokens)
    for number, counts_E in (first.expert_counts or {}).items():
        assert torch.equal(counts_E, (second.expert_counts or {})[number])
        assert int(counts_E.sum()) == first.tokens * 2  # top_k of the pico
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-5, atol=1e-7)


def test_experts_are_balanced_and_reported(data: Path, tmp_path: Path) -> None:
    one = trainer(data, tmp_path, moe=True, steps=2)
    one.run(quiet)
    biases = [value for name, value in one.model.state_dict().items() if name.endswith("expert_bias")]
    assert len(biases) == 3
    for bias in biases:
        steps = (bias / 1e-3).round()
        assert torch.allclose(bias, steps * 1e-3, atol=1e-7)
        assert bias.any()
    row = one.rows[-1]
    assert row["balance_loss"] > 0
    assert row["loss"] == pytest.approx(row["cross_entropy"] + row["balance_loss"], rel=1e-5)
    assert {"router_max_load_percent_max", "router_dead_percent_max", "router_entropy_min"} <= row.keys()


def test_a_phase_moves_its_weights_and_no_others(data: Path, tmp_path: Path) -> None:
    phases = (Phase("second", 0, lambda name: ".layers.1." in name), Phase("all", 2, lambda name: True, 2))
    one = trainer(data, tmp_path, phases=phases, steps=4)
    before = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    one.params = one.params.model_copy(update={"steps": 2})
    one.run(quiet)
    middle = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    moved = {name for name in before if not torch.equal(before[name], middle[name])}
    assert moved
    assert all(".layers.1." in name for name in moved)
    one.params = one.params.model_copy(update={"steps": 4})
    one.run(quiet)
    after = one.model.state_dict()
    assert not torch.equal(after["lm_head.weight"], middle["lm_head.weight"])
    rows = one.rows
    assert [row["phase"] for row in rows] == ["second", "second", "all", "all"]
    assert rows[2]["rate_matrix"] < rows[3]["rate_matrix"] + 0.02  # the second warm-up halves its first step
    assert rows[2]["rate_matrix"] <= 0.5 * 0.02


def test_a_step_that_is_not_finite_changes_nothing(data: Path, tmp_path: Path) -> None:
    one = trainer(data, tmp_path, steps=4)
    one.params = one.params.model_copy(update={"steps": 1})
    one.run(quiet)
    with torch.no_grad():
        one.model.model.norm.weight[0] = float("nan")
    before = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    one.params = one.params.model_copy(update={"steps": 4})
    one.run(quiet)
    assert not one.is_finite
    assert one.record["stopped"]["step"] == 2
    assert one.step == len(one.rows) == 1
    for name, tensor in one.model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_spike_is_marked(data: Path, tmp_path: Path) -> None:
    one = trainer(data, tmp_path, steps=4, spikes={"window": 3, "factor": 1.5})
    one.params = one.params.model_copy(update={"steps": 3})
    one.run(quiet)
    with torch.no_grad():
        one.model.lm_head.weight.mul_(-40.0)
    one.params = one.params.model_copy(update={"steps": 4})
    one.run(quiet)
    assert [row["is_spike"] for row in one.rows] == [False, False, False, True]


def test_recomputed_activations_give_the_same_bits(data: Path, tmp_path: Path) -> None:
    ends = []
    for recompute in (False, True):
        one = trainer(data, tmp_path / str(recompute), moe=True, steps=2, recompute=recompute)
        one.run(quiet)
        ends.append(one)
    assert ends[0].rows == ends[1].rows
    for name, tensor in ends[0].model.state_dict().items():
        assert torch.equal(tensor, ends[1].model.state_dict()[name]), name


def test_a_checkpoint_of_the_workshop_loads(tmp_path: Path) -> None:
    """The fixture itself is a real checkpoint, so what the stages load is what the chain would give them."""
    shop = Workshop.make(tmp_path, pico_moe())
    model = load_student(TensorReader(shop.root / "parent"), pico_moe())
    assert model.config == pico_moe()


@pytest.mark.gpu
def test_a_gpu_follows_the_same_path(data: Path, tmp_path: Path) -> None:
    rows = []
    for device in ("cpu", "cuda"):
        one = trainer(data, tmp_path / device, moe=True, steps=3)
        model = one.model.to(device)
        place = Scratch(tmp_path / device, one.scratch.identity)
        other = Trainer(model, one.params, one.dataset, place)
        other.run(quiet)
        other.save()
        assert other.resume()
        rows.append(other.rows)
    for cpu, cuda in zip(*rows, strict=True):
        assert cuda["cross_entropy"] == pytest.approx(cpu["cross_entropy"], rel=2e-3)
        assert cuda["gradient_norm"] == pytest.approx(cpu["gradient_norm"], rel=2e-2)


@pytest.mark.parametrize("steps", [2, 4])
def test_a_period_that_saves_nothing_is_refused(steps: int) -> None:
    with pytest.raises(ValidationError, match="never saved"):
        heal_params(steps=steps, save_every_steps=steps)
    heal_params(steps=steps, save_every_steps=steps - 1)  # the control
    at_once = {"warmup_steps": 0, "shape": "constant", "final": 1.0}
    heal_params(steps=1, save_every_steps=1, schedule=at_once)  # one step leaves nothing to go on from


@pytest.mark.slow
def test_saving_changes_no_bit(data: Path, tmp_path: Path) -> None:
    often, seldom = (trainer(data, tmp_path / str(n), moe=True, steps=4, save_every_steps=n) for n in (1, 3))
    for one in (often, seldom):
        one.run(quiet)
    assert often.rows == seldom.rows
    for name, tensor in often.model.state_dict().items():
        assert torch.equal(tensor, seldom.model.state_dict()[name]), name
