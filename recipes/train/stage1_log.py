"""The log of a Stage 1 run: JSON lines under a header that says what made them.

Place in the path: steps, router figures, evaluations -> **stage1_log** -> whoever reads the run. The names are those
that `stage1.toml` lists under [logging].

Invariants: the first line is the provenance; each step stands in the log once, also after a kill: lines beyond the
state that a run resumes from, and a line that the kill tore, are taken out first; but for `tokens_per_second` and the
lines of kind `resumed`, a killed and resumed run leaves the log of an uninterrupted one.

Example:
    log = Log(Path("log.jsonl"))
    log.begin(provenance, resumed_step=None)
    log.write("step", step_line(row, seconds=2.5))
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from recipes.model.health import LayerHealth
from recipes.train.step_figures import Row, StepFigures

# How a figure of the layers becomes one figure of the model.
AGGREGATES: dict[str, Callable[[list[float]], float]] = {
    "sequence_auxiliary_loss": fmean,
    "cv_percent": fmean,
    "entropy": fmean,
    "score_entropy": fmean,
    "max_load_percent": max,
    "active_experts": sum,
    "dead_experts": sum,
    "expert_bias_min": min,
    "expert_bias_max": max,
}
_RATE = "rate_"


class Log:
    """A file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, provenance: Mapping[str, Any], *, resumed_step: int | None) -> None:
        """Start afresh, or go on behind the step that a state was saved at."""
        if resumed_step is None:
            self._replace([{"kind": "provenance", **provenance}])
            return
        self._replace(line for line in read_log(self.path) if line.get("step", 0) <= resumed_step)
        self.write("resumed", {"step": resumed_step})

    def write(self, kind: str, line: Mapping[str, Any]) -> None:
        """Append one line; it is in the file when this returns, whatever happens to the process."""
        with self.path.open("a", encoding="utf-8") as out:
            out.write(_text({"kind": kind, **line}))

    def _replace(self, lines: Iterable[Mapping[str, Any]]) -> None:
        beside = self.path.with_suffix(".new")
        beside.write_text("".join(map(_text, lines)), encoding="utf-8")
        os.replace(beside, self.path)


def read_log(path: Path) -> list[dict[str, Any]]:
    """All whole lines."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"


def step_line(row: Row, *, seconds: float) -> dict[str, Any]:
    """One step under the names of the run's file; losses in nats a token; tokens without padding."""
    same = (
        "step", "cross_entropy", "gradient_norm", "consumed_samples", "consumed_tokens", "tokens", "fill", "epoch",
        "is_spike",
    )  # fmt: skip
    spans = ("reasoning", "final")
    return {
        **{name: row[name] for name in same},
        "loss_total": row["loss"],
        "balance_loss": row["balance_loss"],
        **{f"cross_entropy_{span}": row[f"cross_entropy_{span}"] for span in spans},
        **{f"tokens_{span}": row[f"tokens_{span}"] for span in ("plain", *spans)},
        "learning_rate_by_group": {name.removeprefix(_RATE): row[name] for name in row if name.startswith(_RATE)},
        "tokens_per_second": row["tokens"] / seconds if seconds > 0 else None,
    }


def router_line(
    step: int, figures: StepFigures, health: Mapping[int, LayerHealth], uniform: Mapping[str, float]
) -> dict[str, Any]:
    """Router figures of one step: each layer, the whole model, and what a uniform router would show."""
    experts = {number: len(counts_E) for number, counts_E in (figures.expert_counts or {}).items()}
    layers = [
        {
            "layer": number,
            "sequence_auxiliary_loss": float(figures.layer_balance[number]),
            "cv_percent": one.cv_percent,
            "entropy": one.entropy,
            "score_entropy": float(figures.layer_score_entropy[number]),
            "max_load_percent": one.max_load_percent,
            "active_experts": experts[number] - round(one.dead_percent * experts[number] / 100),
            "dead_experts": round(one.dead_percent * experts[number] / 100),
            "expert_bias_min": one.bias_min,
            "expert_bias_max": one.bias_max,
        }
        for number, one in sorted(health.items())
    ]
    together = {name: join([row[name] for row in layers]) for name, join in AGGREGATES.items()} if layers else {}
    return {"step": step, "layers": layers, "all": together, "uniform": dict(uniform)}
