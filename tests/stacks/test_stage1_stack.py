"""Stage 1 in stock Megatron-Core from an exported checkpoint: beside our own model, and stopped and taken up again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stack_cases import CONFIGS, artifact, exported
from stage1_stack import BETAS, CLIP, DECAY, EOD, EPSILON, RATE, STEPS, WARM_UP, loss_of
from test_import_megatron import taken

from recipes.checkpoint import load_student
from recipes.data.megatron_dataset import IndexedDatasetWriter
from recipes.model.config import StudentConfig
from recipes.model.health import balance_loss
from recipes.model.moe import MixtureOfExperts
from recipes.recipe import InputArtifact
from recipes.tensors import TensorReader

HERE = Path(__file__).parent


def megatron_steps(case: Path, data: Path, out: Path, *, until: int) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "stage1_stack.py"), str(case), str(data), str(out), "--until", str(until)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def our_steps(parent: Path, config: StudentConfig, rows: list[dict[str, torch.Tensor]]) -> list[dict[str, float]]:
    """The same steps of our own model: same rows, loss, optimizer and balancing."""
    student = load_student(TensorReader(parent), config)
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, betas=BETAS, eps=EPSILON, weight_decay=DECAY)
    figures = []
    for step, row in enumerate(rows):
        optimizer.zero_grad()
        documents = (row["position_ids"] == 0).long().cumsum(-1)
        hidden, state = student.hidden_and_state(row["tokens"], documents, collect=True)
        loss = loss_of(hidden @ student.head_weight.T, row["labels"], row["span"])
        (loss + balance_loss(state.routing)).backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARM_UP)
        optimizer.step()
        for number, layer in enumerate(student.layers, start=1):
            if isinstance(layer.mlp, MixtureOfExperts):
                layer.mlp.router.update_expert_bias(state.routing[number].counts_E)
        figures.append({"loss": loss.item(), "norm": norm.item()})
    return figures


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations as the arrays of a data set: a question, a reasoning, an answer, and the end of the document."""
    generator = np.random.default_rng(5)
    folder = tmp_path_factory.mktemp("data") / "train"
    folder.mkdir()
    with (
        IndexedDatasetWriter(folder / "shard_00_tokens", np.int32) as tokens,
        IndexedDatasetWriter(folder / "shard_00_span", np.uint8) as spans,
    ):
        for _ in range(60):
            sizes = generator.integers(8, 40, 3)
            tokens.add_document(np.append(generator.integers(0, 199000, sizes.sum()), EOD))
            # Index t speaks of the label after it.
            spans.add_document(np.append(np.repeat([0, 1, 2], sizes)[1:], [2, 0]))
    return folder.parent


@pytest.mark.slow
def test_first_steps_beside_ours_and_a_stop_between_them(data: Path, tmp_path: Path) -> None:
    config = CONFIGS["experts"]
    parent = artifact(tmp_path / "parent", config)
    case = exported(tmp_path / "case", parent, "megatron-plugin")
    whole = megatron_steps(case, data, tmp_path / "whole", until=STEPS)
    rows = torch.load(tmp_path / "whole" / "rows.pt")
    assert len({int(row["position_ids"].max()) for row in rows}) > 1  # documents end inside the rows
    ours = our_steps(parent.path, config, rows)
    for one, other in zip(whole["steps"], ours, strict=True):
        assert one == pytest.approx(other, rel=2e-4)
    first = megatron_steps(case, data, tmp_path / "parts", until=3)
    then = megatron_steps(case, data, tmp_path / "parts", until=STEPS)
    assert (first["first"], then["first"]) == (0, 3)
    assert [*first["steps"], *then["steps"]] == whole["steps"]
    # What was trained comes back, with the optimizer's state beside it passed over.
    shutil.copytree(tmp_path / "whole" / "saved", tmp_path / "iter")
    figures = taken(InputArtifact("parent", "pico@main", "", parent.path), tmp_path / "iter", tmp_path / "out")
    assert figures["ignored"] == 2 * (figures["tensors"] - 3)  # moments of all but the three layers' expert biases
    assert figures["unchanged"] < figures["tensors"]
