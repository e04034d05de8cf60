"""What each rank of test_ranks.py runs: one training, its figures and weights written by the first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from training_pico import params_table, pico_config, pico_moe

from recipes.data.batches import AlignedDataset
from recipes.job import Job
from recipes.model.transformer import Student
from recipes.params.heal import Params
from recipes.recipe import Progress
from recipes.train.loop import Phase, Scratch, Trainer
from recipes.train.state import Identity


def trainer_of(data: Path, folder: Path, kind: str, *, steps: int) -> Trainer:
    """A pico student in training; the same start everywhere."""
    sizes = {"sequence_length": 24, "sequences": 4, "micro_sequences": 1}
    table = params_table(steps=steps, save_every_steps=steps - 1, packing="whole_row", **sizes)
    params = Params.model_validate_json(json.dumps(table)).train
    model = Student(pico_config() if kind.startswith("dense") else pico_moe())
    model.draw(torch.Generator().manual_seed(1))
    scratch = Scratch(folder / "states", Identity({}, params.model_dump(mode="json")))
    new = (Phase("new", 0, lambda name: ".layers.1." in name), Phase("all", steps // 2, lambda name: True))
    options: dict[str, Any] = {"phases": new} if kind.endswith("phases") else {}
    return Trainer(model, params, AlignedDataset(data, "train"), scratch, **options)


@torch.no_grad()
def measured_before(trainer: Trainer) -> None:
    """A stage measures its parent before the first step, when no training pass has been made yet."""
    with trainer.sharding.whole():
        ids = torch.arange(32)[None]
        trainer.record["before"] = float(trainer.model.forward_hidden(ids).double().square().mean())
        head: torch.Tensor = trainer.model.head_weight
        trainer.record["head"] = float(head.double().square().mean())


def train(data: Path, folder: Path, *, steps: int, kind: str = "experts", until: int | None = None) -> None:
    """Go on from a state if there is one, to the end or to a step; what came out lies in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer = trainer_of(data, folder, kind, steps=steps)
    if not trainer.resume():
        measured_before(trainer)
    trainer.on_step = lambda row, figures: trainer.step == until
    trainer.run(lambda *_: None)
    if until is not None:
        trainer.save()
    with trainer.sharding.whole():
        weights = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    weights |= {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}
    if trainer.ranks.is_first:
        save_file(weights, folder / f"weights-{trainer.step}.safetensors")
        (folder / f"rows-{trainer.step}.json").write_text(json.dumps(trainer.rows))
        (folder / "record.json").write_text(json.dumps({**trainer.record, "rows": []}))


def work(job: Job, progress: Progress) -> None:
    """All cases of a job, one after the other."""
    for case in job.params["cases"]:
        train(
            Path(case["data"]), Path(case["folder"]), **{k: v for k, v in case.items() if k not in ("data", "folder")}
        )
