"""Prompts with numbers: does the model still read and write them?

Place in the path: a model + a tokenizer -> **numeric** -> gates, evaluate. Answers are teacher-forced: each token is
right if it would have been the model's first choice, and a prompt is exact if all of its tokens are. Every copy prompt
is also asked with the number of its neighbour: a model to which the right number makes no difference is at chance.

Invariants: the prompts are fixed text; context and answer are encoded apart, so an answer has the ids that it has
alone.

Example:
    >>> number_prompts(stride=500)[-1].answer
    '15'
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from recipes.train.losses import TokenScores
from recipes.train.scoring import Prompt, Reader, score_answers

GOLDENS = ("1 2 3 4 5", "1234567890", "1.2345e-10", "2025-08-05", "1/3 = 0.333...")
SUMS = ((2, 2), (3, 5), (7, 6), (9, 9), (12, 7), (8, 7))

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class NumberPrompt:
    """One question; `control` is the same form with another number, None for sums."""

    family: Literal["copy", "three_digits", "sum"]
    context: str
    answer: str
    control: str | None = None


def number_prompts(*, stride: int) -> list[NumberPrompt]:
    """The runbook's numbers to be copied, every `stride`-th number of three digits likewise, and small sums."""
    numbers = [f"{number:03d}" for number in range(0, 1000, stride)]
    prompts = [*_copies("copy", GOLDENS), *_copies("three_digits", numbers)]
    return prompts + [NumberPrompt("sum", f"{a} + {b} = ", str(a + b)) for a, b in SUMS]


def _copies(family: Literal["copy", "three_digits"], numbers: Sequence[str]) -> list[NumberPrompt]:
    others = [*numbers[1:], numbers[0]] if len(numbers) > 1 else ["."]
    return [
        NumberPrompt(family, _copy_context(number), number, _copy_context(other))
        for number, other in zip(numbers, others, strict=True)
    ]


def _copy_context(number: str) -> str:
    return f"Repeat exactly: {number}\n"


@dataclass(frozen=True)
class NumberTable:
    """Figures over all prompts, and one row a prompt."""

    accuracy: float  # share of prompts with every token right
    token_accuracy: float
    nll: float  # nats a token of the answers
    gain: float  # nats a token by which the right number helps against its neighbour's, copy prompts
    rows: list[dict[str, Any]]

    def figures(self) -> dict[str, float]:
        """Without the rows."""
        return {
            "accuracy": self.accuracy,
            "token_accuracy": self.token_accuracy,
            "nats_per_token": self.nll,
            "copy_gain": self.gain,
        }


def number_table(reader: Reader, encode: Encode, *, separator: int, stride: int) -> NumberTable:
    """Ask all prompts, each behind the separator."""
    prompts = number_prompts(stride=stride)
    answers = [encode(prompt.answer) for prompt in prompts]

    def asked(context: str, answer: list[int]) -> Prompt:
        return [separator, *encode(context)], answer

    right = [asked(prompt.context, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    pairs = [(prompt.control, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    wrong = [asked(control, answer) for control, answer in pairs if control is not None]
    scores = score_answers(reader, [*right, *wrong])
    rows = [_row(*parts) for parts in zip(prompts, answers, scores[: len(right)], strict=True)]
    nll = torch.cat([one.nll_N for one in scores[: len(right)]]).double()
    copied = torch.cat([one.nll_N for one in scores[: len(wrong)]]).double()
    control = torch.cat([one.nll_N for one in scores[len(right) :]]).double()
    return NumberTable(
        accuracy=sum(row["is_exact"] for row in rows) / len(rows),
        token_accuracy=sum(row["right_tokens"] for row in rows) / sum(row["tokens"] for row in rows),
        nll=float(nll.mean()),
        gain=float((control - copied).mean()),
        rows=rows,
    )


def _row(prompt: NumberPrompt, answer: list[int], scores: TokenScores) -> dict[str, Any]:
    right = int((scores.best_N == torch.tensor(answer)).sum())
    return {
        "family": prompt.family,
        "answer": prompt.answer,
        "tokens": len(answer),
        "right_tokens": right,
        "is_exact": right == len(answer),
        "nats_per_token": float(scores.nll_N.double().mean()),
    }
