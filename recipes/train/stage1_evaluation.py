"""What Stage 1 looks at every N steps: held-out loss by span, and whether sampled answers are valid Harmony.

Place in the path: the model in training -> **stage1_evaluation** -> stage1_run.

Invariants: measured on held-out documents in their own order, so that two evaluations see the same; sums and counts
are added up before they are divided; an answer that did not end within its tokens is not valid, and is counted apart.

Example:
    figures = evaluate(model, Examination(valid, tokenizer, smoke, "best_fit", (0.0, 1.0, 1.0)))
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from recipes.data.batches import AlignedDataset, calibration_batches
from recipes.data.harmony import HarmonyTokenizer
from recipes.data.packing import Packing
from recipes.model.precision import REFERENCE, Numerics
from recipes.model.transformer import Student
from recipes.train.conversation_validity import (
    RETURN,
    START,
    answer_fault,
    control_token_figures,
    conversations,
    prompt_of,
    sampled_answers,
)
from recipes.train.losses import SPANS, VALID_VOCAB, token_losses
from recipes.train.scoring import Reader


@dataclass(frozen=True)
class Examination:
    """With what a model is examined."""

    held_out: AlignedDataset
    tokenizer: HarmonyTokenizer
    sizes: Mapping[str, Any]  # [smoke] of the run
    packing: Packing
    span_weights: tuple[float, float, float]
    answers: Numerics = REFERENCE  # how answers are sampled


@torch.no_grad()
def evaluate(model: Student, exam: Examination) -> dict[str, Any]:
    """All figures; JSON values only. The model is left in the mode it was in."""
    was_training = model.training
    model.eval()
    reader = Reader(model, VALID_VOCAB, exam.sizes["loss_chunk"])
    found = {**held_out_figures(model, exam), **_control_tokens(reader, exam), **_answers(model, exam)}
    model.train(was_training)
    return found


def held_out_figures(model: Student, exam: Examination) -> dict[str, Any]:
    """Nats a token in each span, over all, and the objective as it is trained, without balance losses."""
    device = model.head_weight.device
    sums, counts = [0.0] * len(SPANS), [0] * len(SPANS)
    tokens, length = min(exam.sizes["held_out_tokens"], exam.held_out.tokens), exam.sizes["sequence_length"]
    for batch in calibration_batches(exam.held_out, sequence_length=length, tokens=tokens, packing=exam.packing):
        hidden_BTH = model.forward_hidden(batch.ids_BT.to(device), batch.documents_BT.to(device))
        kept_N = (batch.loss_mask_BT > 0).flatten()
        labels_N, span_N = batch.labels_BT.flatten()[kept_N], batch.span_BT.flatten()[kept_N]
        hidden_NH = hidden_BTH.flatten(0, 1)[kept_N.to(device)]
        nll_N = token_losses(hidden_NH, model.head_weight, labels_N.to(device), chunk=exam.sizes["loss_chunk"]).cpu()
        for span in range(len(SPANS)):
            sums[span] += float(nll_N[span_N == span].double().sum())
            counts[span] += int((span_N == span).sum())
    means = [total / count if count else None for total, count in zip(sums, counts, strict=True)]
    return {
        **{f"held_out_cross_entropy_{name}": mean for name, mean in zip(SPANS[1:], means[1:], strict=True)},
        "held_out_cross_entropy": math.fsum(sums) / max(sum(counts), 1),
        "held_out_objective": math.fsum(
            weight * mean for weight, mean in zip(exam.span_weights, means, strict=True) if mean is not None
        ),
        **{f"held_out_tokens_{name}": count for name, count in zip(SPANS, counts, strict=True)},
    }


def _control_tokens(reader: Reader, exam: Examination) -> dict[str, Any]:
    return dict(
        control_token_figures(
            reader, exam.held_out, rows=exam.sizes["control_rows"], max_tokens=exam.sizes["sequence_length"]
        )
    )


def _answers(model: Student, exam: Examination) -> dict[str, Any]:
    """Greedy answers to held-out prompts, read by the parser; `format_validity` is None if nothing is held out."""
    opening = [START, *exam.tokenizer.encode("assistant")]
    asked = [prompt_of(tokens, mask, opening) for tokens, mask in conversations(exam.held_out, exam.sizes["answers"])]
    answers = sampled_answers(model, asked, max_new_tokens=exam.sizes["max_new_tokens"], numerics=exam.answers)
    faults = [answer_fault([*opening, *answer], exam.tokenizer.decode) for answer in answers]
    return {
        "format_validity": faults.count("") / len(faults) if faults else None,
        "answers": len(answers),
        "answers_unfinished": sum(not answer or answer[-1] != RETURN for answer in answers),
        "samples": [
            {"fault": fault, "text": exam.tokenizer.decode([*opening, *answer])}
            for fault, answer in zip(faults, answers, strict=True)
        ],
    }
