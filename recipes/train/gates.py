"""What a training stage must reach, measured before and after, and judged.

Place in the path: loop -> **gates** -> report. `measure` gives figures of one model; `judge` holds the result's against
the parent's and against the thresholds of the params.

Invariants: the parent's figures are measured before the first step and survive in the saved state, so a resumed run is
judged by the same figures; a gate that the parent itself is at chance on says so instead of passing.

Example:
    before = measure(model, probe)
    gates = judge(before, measure(model, probe), params.gates)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from recipes.data.batches import AlignedDataset, calibration_batches
from recipes.data.harmony import EOD, HarmonyTokenizer
from recipes.model.health import added_counts, health_rows, router_health
from recipes.model.precision import REFERENCE, Numerics
from recipes.model.transformer import Student
from recipes.params.training import GateParams, HarmonyParams, NumericParams
from recipes.recipe import Gate
from recipes.train.conversation_validity import Sampling, control_token_figures, sampled_figures
from recipes.train.losses import VALID_VOCAB, token_losses
from recipes.train.numeric import number_table
from recipes.train.scoring import Reader

Figures = dict[str, Any]


@dataclass(frozen=True)
class Probe:
    """What a model is measured with."""

    held_out: AlignedDataset
    tokenizer: HarmonyTokenizer
    gates: GateParams
    chunk: int
    answers: Numerics = REFERENCE  # how answers are sampled


@torch.no_grad()
def measure(model: Student, probe: Probe) -> Figures:
    """Held-out loss, numbers, Harmony and routers of one model; JSON values only.

    A figure that is not finite is None: JSON has no other word for it.
    """
    model.eval()
    reader = Reader(model, VALID_VOCAB, probe.chunk)
    numbers = number_table(reader, probe.tokenizer.encode, separator=EOD, stride=probe.gates.numeric.three_digit_stride)
    held_out, router = held_out_figures(model, probe)
    return {
        "held_out": _finite(held_out),
        "numeric": _finite(numbers.figures()),
        "harmony": _finite(_harmony(model, reader, probe)),
        "router": router,
        "is_finite": all(bool(torch.isfinite(tensor).all()) for tensor in named_tensors(model).values()),
    }


def named_tensors(model: Student) -> dict[str, torch.Tensor]:
    """Weights and buffers as they lie: a model that is shared out and put together for a while is whole here."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def held_out_figures(model: Student, probe: Probe) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Loss over the first held-out tokens, and one row of router health a layer with experts."""
    settings = probe.gates.held_out
    tokens = min(settings.tokens, probe.held_out.tokens)
    nats, counted, routed = 0.0, 0, []
    device = model.head_weight.device
    for batch in calibration_batches(probe.held_out, sequence_length=settings.sequence_length, tokens=tokens):
        hidden_BTH, state = model.hidden_and_state(batch.ids_BT.to(device), batch.documents_BT.to(device), collect=True)
        kept_N = (batch.loss_mask_BT > 0).flatten().to(device)
        labels_N = batch.labels_BT.flatten().to(device)[kept_N]
        nll_N = token_losses(hidden_BTH.flatten(0, 1)[kept_N], model.head_weight, labels_N, chunk=probe.chunk)
        nats, counted = nats + float(nll_N.double().sum()), counted + len(labels_N)
        routed.append(state.routing)
    health = router_health(model, added_counts(routed)) if model.config.moe is not None else {}
    mean = nats / max(counted, 1)
    figures = {"nats_per_token": mean, "bits_per_token": mean / math.log(2), "tokens": float(counted)}
    return figures, health_rows(health)


def _harmony(model: Student, reader: Reader, probe: Probe) -> dict[str, float]:
    settings, longest = probe.gates.harmony, model.config.max_sequence
    figures = control_token_figures(reader, probe.held_out, rows=settings.rows, max_tokens=longest)
    if settings.mode == "sampled":
        sampling = Sampling(
            rows=settings.rows,
            max_new_tokens=settings.max_new_tokens,
            decode=probe.tokenizer.decode,
            assistant=probe.tokenizer.encode("assistant"),
            numerics=probe.answers,
        )
        figures |= sampled_figures(model, probe.held_out, sampling)
    return figures


def judge(before: Figures, after: Figures, gates: GateParams) -> list[Gate]:
    """Gates of the result, the parent's figures in hand."""
    return [
        Gate("weights_finite", float(after["is_finite"]), "==", 1.0),
        _held_out_gate(before["held_out"], after["held_out"], gates.held_out.improvement),
        *_numeric_gates(before["numeric"], after["numeric"], gates.numeric),
        _harmony_gate(after["harmony"], gates.harmony),
        *_router_gates(after["router"], gates),
    ]


def _held_out_gate(before: Figures, after: Figures, improvement: float) -> Gate:
    gain = _value(before["nats_per_token"]) - _value(after["nats_per_token"])
    return Gate("held_out_improvement", gain, ">=", improvement)


def _value(figure: float | None) -> float:
    """NaN for a figure that was not finite: it passes no gate."""
    return math.nan if figure is None else figure


def _numeric_gates(before: Figures, after: Figures, settings: NumericParams) -> list[Gate]:
    floor = _value(before["accuracy"]) - settings.accuracy_margin
    ceiling = _value(before["nats_per_token"]) + settings.nll_margin
    is_accuracy_chance = _value(before["accuracy"]) < settings.measurable_accuracy
    is_nll_chance = _value(before["copy_gain"]) < settings.measurable_gain
    return [
        _gate_or_chance(
            Gate("numeric_accuracy", _value(after["accuracy"]), ">=", floor),
            is_accuracy_chance,
            f"the parent answers {_value(before['accuracy']):.4g} of the prompts, "
            f"below {settings.measurable_accuracy:g}",
        ),
        _gate_or_chance(
            Gate("numeric_nats_per_token", _value(after["nats_per_token"]), "<=", ceiling),
            is_nll_chance,
            f"the right number helps the parent by {_value(before['copy_gain']):.4g} nats a token, "
            f"below {settings.measurable_gain:g}",
        ),
    ]


def _gate_or_chance(gate: Gate, is_chance: bool, reason: str) -> Gate:
    return Gate(gate.name, None, gate.relation, gate.threshold, reason) if is_chance else gate


def _harmony_gate(after: Figures, settings: HarmonyParams) -> Gate:
    name = "control_token_accuracy" if settings.mode == "control_token_accuracy" else "valid_answers"
    if name not in after:
        reason = "no held-out conversation has a token to judge"
        return Gate(f"harmony_{name}", None, ">=", settings.threshold, reason)
    return Gate(f"harmony_{name}", _value(after[name]), ">=", settings.threshold)


def _router_gates(rows: list[dict[str, Any]], gates: GateParams) -> list[Gate]:
    if not rows:
        return []
    return [
        Gate("router_max_dead_percent", max(row["dead_percent"] for row in rows), "<=", 100 * gates.router.max_dead),
        Gate(
            "router_max_load_percent", max(row["max_load_percent"] for row in rows), "<=", 100 * gates.router.max_load
        ),
    ]


def training_gates(rows: list[dict[str, Any]], *, stopped: Mapping[str, Any] | None, max_spikes: int) -> list[Gate]:
    """Gates of the run itself: every step finite, few spikes."""
    spikes = sum(1 for row in rows if row["is_spike"])
    return [
        Gate("steps_not_finite", 0.0 if stopped is None else 1.0, "==", 0.0),
        Gate("loss_spikes", float(spikes), "<=", float(max_spikes)),
    ]
