"""A training stage from its parent to its report: what `heal` and `wake_up` have in common.

Place in the path: parent, data, tokenizer -> **stage** -> checkpoint and report.

Invariants: weights are trained in float32 and measured as they will be written; the state is saved before the gates are
judged, so a missed gate or a kill during the measuring costs no step.

Example:
    return train_stage(context, context.params.train, context.params.gates, phases=(ALL_WEIGHTS,))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recipes import runtime
from recipes.checkpoint import (
    expected_tensors,
    load_student,
    parse_student_config,
    student_files,
)
from recipes.data.batches import AlignedDataset
from recipes.data.harmony import HarmonyTokenizer
from recipes.model.transformer import Student
from recipes.params.training import GateParams, TrainingParams
from recipes.recipe import Context, Gate, Report, RunResult, refuse_missed
from recipes.tensors import TORCH_DTYPES
from recipes.train.gates import Figures, Probe, judge, measure, named_tensors, training_gates
from recipes.train.loop import Phase, Scratch, Trainer
from recipes.train.passes import answers_in
from recipes.train.state import Identity
from vpstore.errors import RecipeRefused

STATES = "training"  # folder of the saved states in the scratch folder


def train_stage(context: Context, train: TrainingParams, gates: GateParams, *, phases: Sequence[Phase]) -> RunResult:
    """Load, measure, train, measure, judge.

    Raises:  GateMissed: with all figures; RecipeRefused: an input or a saved state that does not fit.
    """
    parent, data = context.inputs["parent"], context.inputs["data"].path
    config = parse_student_config(parent.json("config.json"))
    files = student_files(config, context.inputs["tokenizer"])
    model = load_student(parent.tensors(), config, device=runtime.device())
    require_finite(model, where=f"parent {parent.ref}")
    tokenizer = HarmonyTokenizer.from_directory(context.inputs["tokenizer"].path)
    scratch = Scratch(context.scratch / STATES, Identity.of(context))
    trainer = Trainer(model, train, AlignedDataset(data, "train"), scratch, phases=phases)
    probe = Probe(AlignedDataset(data, "valid"), tokenizer, gates, train.loss.chunk, answers_in(trainer.numerics))
    if not trainer.resume():
        with trainer.sharding.whole():
            trainer.record["before"] = measure(model, probe)
    trainer.run(context.progress)
    trainer.save()
    with trainer.sharding.whole():
        tensors = written_tensors(model)
        after = measure(model, probe)
    report = _report(trainer, after, gates)
    refuse_missed(report.gates, where=f"the result of training {parent.ref}")
    return RunResult(tensors, files, report)


@torch.no_grad()
def require_finite(model: Student, *, where: str) -> None:
    """Refuse weights that no training could mend.

    Raises:  RecipeRefused: naming the tensors that hold NaN or infinity.
    """
    faults = [name for name, tensor in model.state_dict().items() if not bool(torch.isfinite(tensor).all())]
    if faults:
        raise RecipeRefused(
            "weights are not finite",
            where=where,
            expected="numbers in every tensor",
            found=f"NaN or infinity in {', '.join(faults[:4])}"
            + (f" and {len(faults) - 4} more" if faults[4:] else ""),
            next_step="vpstore diff it with its own parent, to see where they came in; build it again",
        )


@torch.no_grad()
def written_tensors(model: Student) -> dict[str, Tensor]:
    """All tensors in their dtypes on disk; the model is rounded to them in place, so that this is what is measured."""
    specs = expected_tensors(model.config)
    found = {}
    for name, tensor in named_tensors(model).items():
        found[name] = tensor.to(TORCH_DTYPES[specs[name][0]], copy=True).cpu().contiguous()
        tensor.copy_(found[name])
    return found


def _report(trainer: Trainer, after: Figures, gates: GateParams) -> Report:
    record: dict[str, Any] = trainer.record
    rows, before = trainer.rows, record["before"]
    judged: list[Gate] = [
        *training_gates(rows, stopped=record["stopped"], max_spikes=gates.max_spikes),
        *judge(before, after, gates),
    ]
    last = rows[-1] if rows else {}
    metrics: dict[str, Any] = {
        "before": _numbers(before),
        "after": _numbers(after),
        "training": {
            "steps": len(rows),
            **{key: last[key] for key in ("consumed_samples", "consumed_tokens", "cross_entropy") if key in last},
            **({"stopped": record["stopped"]} if record["stopped"] else {}),
            **({"ranks": record["ranks"]} if record["ranks"] != [{"from_step": 0, "ranks": 1}] else {}),
        },
    }
    plots = {"training": rows, **({"router": after["router"]} if after["router"] else {})}
    return Report(metrics, judged, plots)


def _numbers(figures: Figures) -> Figures:
    """Without the rows that are a plot."""
    return {name: value for name, value in figures.items() if name != "router"}
