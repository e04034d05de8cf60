"""A Stage 1 run in its rehearsal sizes: the reference for a real trainer, in one process.

Place in the path: stage1_inputs -> **stage1_run** -> log, states, summary. The loop, its optimizer, its states and its
losses are those of every training recipe; what is added here is what the run's file asks for: logs, evaluations and
stop rules.

Invariants: everything but the sizes under [smoke] comes from the run's file; weights start from the checkpoint that
the file names, the optimizer and the schedule from step 0; what decides when to stop is saved with the state.

Example:
    Stage1Run(open_inputs(run, folders), Path("runs/stage1-smoke/whole")).go()
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from recipes import runtime
from recipes.checkpoint import load_student
from recipes.data.batches import AlignedDataset
from recipes.data.harmony import HarmonyTokenizer
from recipes.model.health import router_health
from recipes.params.training import OptimizerParams, TrainingParams
from recipes.tensors import TensorReader
from recipes.train.loop import Scratch, Trainer
from recipes.train.passes import answers_in
from recipes.train.stage1_evaluation import Examination, evaluate
from recipes.train.stage1_inputs import Stage1Inputs
from recipes.train.stage1_log import Log, router_line, step_line
from recipes.train.stage1_stop import judge_stop
from recipes.train.state import DOCUMENT, Identity
from recipes.train.step_figures import Row, StepFigures
from recipes.train.trainer_code import code_digest
from vpstore.errors import GateMissed

LOG_FILE, STATES, SUMMARY_FILE = "log.jsonl", "states", "summary.json"
_SUMMARISED = (
    "held_out_cross_entropy_reasoning",
    "held_out_cross_entropy_final",
    "format_validity",
    "answers",
    "answers_unfinished",
    "control_token_accuracy",
)
_SPIKES = {"window": 8, "factor": 2.0}  # marks in the log; no rule of the run depends on them


class Stage1Run:
    """One process's life of the run: started, or taken up from a state."""

    def __init__(self, inputs: Stage1Inputs, out: Path) -> None:
        self.inputs, self.out, self.document = inputs, out, inputs.document
        self.digests = {**inputs.digests, "code": code_digest()}
        self.log = Log(out / LOG_FILE)
        self.trainer = self._trainer(training_params(inputs.document))
        self.trainer.world = self.document["smoke"]["processes"]
        self.trainer.on_step = self._on_step
        self._clock = time.monotonic()

    def go(self) -> dict[str, Any]:
        """Train to the end, or to where a stop rule says so.

        Returns: the summary, which is written beside the log too.
        Raises:  RecipeRefused: a saved state of another run or of other code, a log that is not whole.
                 GateMissed: a loss that is not finite, or a collapse.
        """
        trainer = self.trainer
        is_resumed = trainer.resume()
        self.log.begin(self._provenance(), resumed_step=trainer.step if is_resumed else None)
        if not is_resumed:
            trainer.record |= {"evaluations": [], "stop": None}
            self._evaluate()
        if (trainer.record["stop"] or {"verdict": "go on"})["verdict"] == "go on":
            self._clock = time.monotonic()
            trainer.run(_silent)
            trainer.save()
        summary = self._summary()
        (self.out / SUMMARY_FILE).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        self._require_sound()
        return summary

    def _trainer(self, params: TrainingParams) -> Trainer:
        folders = self.inputs.folders
        model = load_student(TensorReader(folders["checkpoint"]), self.inputs.config, device=runtime.device())
        scratch = Scratch(self.out / STATES, Identity(self.digests, params.model_dump(mode="json")))
        trainer = Trainer(model, params, AlignedDataset(folders["data"], "train"), scratch)
        self.exam = Examination(
            AlignedDataset(folders["data"], "valid"),
            HarmonyTokenizer.from_directory(folders["tokenizer"]),
            self.document["smoke"],
            params.packing,
            params.loss.span_weights,
            answers_in(trainer.numerics),
        )
        self.student = model
        return trainer

    def _on_step(self, row: Row, figures: StepFigures) -> bool:
        """Log, evaluate, judge; whether the run ends here."""
        sizes, step, record = self.document["smoke"], self.trainer.step, self.trainer.record
        is_last = step == sizes["steps"]
        now = time.monotonic()
        self.log.write("step", step_line(row, seconds=now - self._clock))
        if step % sizes["router_log"] == 0 or is_last:
            health = router_health(self.student, figures.expert_counts or {})
            record["router"] = router_line(step, figures, health, self._uniform())
            self.log.write("router", record["router"])
        if step % sizes["evaluate"] == 0 or is_last:
            self._evaluate()
        self._clock = time.monotonic()  # evaluations are no part of a step's time
        stop = record["stop"]
        return stop is not None and stop["verdict"] != "go on"

    def _evaluate(self) -> None:
        record, step = self.trainer.record, self.trainer.step
        found = {"step": step, **evaluate(self.student, self.exam)}
        record["evaluations"].append(found)
        self.log.write("evaluation", found)
        router = record.get("router", {"step": step, "layers": []})
        record["stop"] = judge_stop(record["evaluations"], router, self.document["stop"])
        self.log.write("stop", {"step": step, **record["stop"]})

    def _uniform(self) -> dict[str, float]:
        """What a router that spreads its tokens evenly would show."""
        logging = self.document["logging"]
        return {
            "entropy": logging["uniform_entropy"],
            "max_load_percent": logging["uniform_max_load_percent"],
            "sequence_auxiliary_loss": self.document["router"]["balance_loss_weight"],
            "cv_percent": 0.0,
        }

    def _provenance(self) -> dict[str, Any]:
        digests, inputs = self.digests, self.document["inputs"]
        return {
            **git_state(),
            **{f"{name}_digest": digests[name] for name in sorted(digests)},
            "checkpoint_ref": inputs["checkpoint"]["ref"],
            "data_ref": inputs["data"]["ref"],
            "device": runtime.device(),
            "precision": "fp32",  # of the rehearsal, whatever the run's file asks of the real trainer
            "smoke": dict(self.document["smoke"]),
            **self._packing(),
        }

    def _packing(self) -> dict[str, Any]:
        """How rows are made, and what it costs documents that are longer than the rehearsal's rows."""
        trainer = self.trainer
        return {
            "packing": trainer.params.packing,
            "documents": len(trainer.dataset),
            "documents_cut": trainer.packed.documents_cut,
        }

    def _summary(self) -> dict[str, Any]:
        record, trainer = self.trainer.record, self.trainer
        state = trainer.scratch.folder / f"state-{trainer.step:08d}"
        losses = [row["loss"] for row in record["rows"]]
        ends = record["evaluations"][0], record["evaluations"][-1]
        return {
            "schema": 1,
            "steps": trainer.step,
            **self._packing(),
            "consumed_tokens": record["rows"][-1]["consumed_tokens"] if losses else 0,
            "fill": fmean(row["fill"] for row in record["rows"]) if losses else None,
            "loss_first": losses[0] if losses else None,
            "loss_last": losses[-1] if losses else None,
            "before": {name: ends[0].get(name) for name in _SUMMARISED},
            "after": {name: ends[1].get(name) for name in _SUMMARISED},
            "stop": record["stop"],
            "stopped": record["stopped"],
            "state_tensors": json.loads((state / DOCUMENT).read_text())["tensors"],
            "digests": self.digests,
        }

    def _require_sound(self) -> None:
        record = self.trainer.record
        is_collapsed = record["stop"]["verdict"] == "router collapse"
        if record["stopped"] or is_collapsed:
            raise GateMissed(
                "a router has collapsed" if is_collapsed else "a step of Stage 1 is not finite",
                where=f"step {self.trainer.step}",
                expected=f"[stop] of the run: {dict(self.document['stop'])}" if is_collapsed else "finite figures",
                found=str(record["stop"]["collapsed_layers"] if is_collapsed else record["stopped"]),
                next_step=f"read {LOG_FILE}; the state is kept",
            )


def training_params(document: Mapping[str, Any]) -> TrainingParams:
    """The loop's params: the run's objective, optimizer, order and packing in the sizes of its rehearsal."""
    smoke, weights = document["smoke"], document["loss"]["weights"]
    optimizer = {name: document["optimizer"][name] for name in OptimizerParams.model_fields}
    table = {
        "steps": smoke["steps"],
        "sequence_length": smoke["sequence_length"],
        "sequences": smoke["global_sequences"],
        "micro_sequences": smoke["micro_sequences"],
        "seed": document["seeds"]["data_order"],
        "save_every_steps": smoke["save"],
        "packing": document["data"]["packing"],
        "schedule": {
            "warmup_steps": smoke["warmup_steps"],
            "shape": document["schedule"]["shape"],
            "final": document["schedule"]["final"],
        },
        # Equal bits are promised for float32 products only.
        "optimizer": {**optimizer, "orthogonal_dtype": "float32"},
        "loss": {
            "kind": "span",
            "span_weights": [0.0, weights["reasoning"], weights["final"]],
            "chunk": smoke["loss_chunk"],
        },
        "spikes": _SPIKES,
    }
    return TrainingParams.model_validate_json(json.dumps(table))


def git_state() -> dict[str, Any]:
    """The commit of the code that runs, and whether the tree differs from it; None outside a git checkout."""
    root = Path(__file__).resolve().parent

    def say(*command: str) -> str | None:
        try:
            done = subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = say("status", "--porcelain")
    return {"git_sha": say("rev-parse", "HEAD"), "git_dirty": None if changes is None else bool(changes)}


def _silent(label: str, done: int, total: int) -> None:
    """The log says how far the run is."""
