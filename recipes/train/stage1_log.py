"""The log of a Stage 1 run: JSON lines under a header that says what made them.

Place in the path: steps, router figures, evaluations -> **stage1_log** -> whoever reads the run. The names are those
that `stage1.toml` lists under [logging].

Invariants: the first line is the provenance; each step stands in the log once, also after a kill: lines beyond the
state that a run resumes from, and a line that the kill tore, are taken out first; but for `tokens_per_second`, git and
the lines of kind `resumed`, a killed and resumed run leaves the log of an uninterrupted one. A `resumed` line has the
provenance of the process that writes it; a log that does not reach up to the state is refused.

Example:
    log = Log(Path("log.jsonl"))
    log.begin(provenance, resumed_step=None)
    log.write("step", step_line(row, seconds=2.5))
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO

from recipes.model.health import LayerHealth
from recipes.train.step_figures import Row, StepFigures
from vpstore.errors import RecipeRefused

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
        """Start afresh, or go on behind the step that a state was saved at.

        Raises:  RecipeRefused: the log is gone, or does not reach up to that step.
        """
        if resumed_step is None:
            self._replace([{"kind": "provenance", **provenance}])
            return
        kept = [line for line in read_log(self.path) if line.get("step", 0) <= resumed_step]
        self._require_whole(kept, resumed_step)
        self._replace(kept)
        self.write("resumed", {"step": resumed_step, **provenance})

    def write(self, kind: str, line: Mapping[str, Any]) -> None:
        """Append one line; it is on the disk when this returns, as a state that follows it will be."""
        with self.path.open("a", encoding="utf-8") as out:
            _put(out, [{"kind": kind, **line}])

    def _require_whole(self, kept: Sequence[Mapping[str, Any]], resumed_step: int) -> None:
        """What a process logs under a header that another one wrote, or under none, would be told of the wrong run."""
        steps = [line["step"] for line in kept if line["kind"] == "step"]
        if kept and kept[0]["kind"] == "provenance" and steps == list(range(1, resumed_step + 1)):
            return
        raise RecipeRefused(
            "the log of the run is not whole",
            where=self.path.name,
            expected=f"the provenance, and steps 1 to {resumed_step}, where the newest state stands",
            found=f"{len(kept)} lines, {len(steps)} of them steps" if kept else "no log",
            next_step="bring the log back that lay beside the states, or start again in an empty folder",
        )

    def _replace(self, lines: Iterable[Mapping[str, Any]]) -> None:
        beside = self.path.with_suffix(".new")
        with beside.open("w", encoding="utf-8") as out:
            _put(out, lines)
        os.replace(beside, self.path)


def read_log(path: Path) -> list[dict[str, Any]]:
    """All whole lines.

    Raises:  RecipeRefused: a line that is none of a log.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    return [_line(path, number, line) for number, line in enumerate(lines, start=1) if line.endswith(b"\n")]


def _line(path: Path, number: int, text: bytes) -> dict[str, Any]:
    try:
        line = json.loads(text)
        if isinstance(line, dict) and "kind" in line:
            return line
    except ValueError:
        pass
    raise RecipeRefused(
        "a line of a log is damaged",
        where=f"{path.name}, line {number}",
        expected="a JSON object with a kind",
        found=repr(text[:80]),
        next_step="bring the log back as it was written, or start again in an empty folder",
    )


def _put(out: TextIO, lines: Iterable[Mapping[str, Any]]) -> None:
    out.write("".join(map(_text, lines)))
    out.flush()
    os.fsync(out.fileno())


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
