"""Knobs of `recipes.stage1_handoff`: everything of the Stage 1 run that the checkpoint does not say itself.

Place in the path: **config** -> recipe.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from recipes.params.base import ParamsBase
from recipes.params.training import OptimizerParams, ScheduleParams


class BatchParams(ParamsBase):
    """The global batch, and how much is trained."""

    sequence_length: int = Field(gt=1)
    global_sequences: int = Field(gt=0)
    micro_sequences: int = Field(gt=0)
    target_tokens: int = Field(gt=0)
    precision: Literal["bf16", "fp32"]  # the router computes in float32 in both

    @model_validator(mode="after")
    def _divides(self) -> BatchParams:
        if self.global_sequences % self.micro_sequences:
            raise ValueError(f"{self.global_sequences} rows do not divide into {self.micro_sequences}")
        return self


class SpanWeights(ParamsBase):
    """Objective: each weight times the mean loss of its span over the global batch."""

    reasoning: float = Field(ge=0)
    final: float = Field(ge=0)


class SeedParams(ParamsBase):
    """Every source of chance."""

    model: int
    data_order: int


class PeriodParams(ParamsBase):
    """Every how many steps."""

    save: int = Field(gt=0)
    evaluate: int = Field(gt=0)
    router_log: int = Field(gt=0)


class EvaluationParams(ParamsBase):
    """What the full-size run measures at each evaluation; the stop rules depend on it."""

    held_out_tokens: int = Field(gt=0)
    control_rows: int = Field(gt=0)  # held-out conversations whose control tokens are looked at
    prompts: int = Field(gt=0)  # held-out prompts that are answered
    max_new_tokens: int = Field(gt=0)  # of an answer; one that does not end within them is not valid
    decoding: Literal["greedy"]


class StopParams(ParamsBase):
    """When the run ends before its tokens do, and when it must not go on."""

    min_format_validity: float = Field(ge=0, le=1)
    format_window: int = Field(gt=0)  # evaluations over which it must hold
    flat_improvement: float = Field(ge=0)  # nats a token below which held-out loss counts as flat
    flat_window: int = Field(gt=0)  # evaluations
    max_dead: float = Field(ge=0, le=1)  # share of a layer's experts
    max_load: float = Field(gt=0, le=1)  # share of a layer's picks
    alarm_after_steps: int = Field(ge=0)


class LaterStage(ParamsBase):
    """A stage that starts from another's result; out of scope here, its contract is not."""

    name: str
    starts_from: str  # the stage whose published checkpoint it takes, by digest
    tokens: int = Field(gt=0)
    objective: str
    teacher_gives: str  # what the teacher is asked for
    data: str


class SmokeParams(ParamsBase):
    """Sizes by which the run is rehearsed on a small machine; all else is the run's own."""

    steps: int = Field(gt=1)
    sequence_length: int = Field(gt=1)
    global_sequences: int = Field(gt=0)
    micro_sequences: int = Field(gt=0)
    processes: int = Field(gt=0)  # that share a step's rows; one after the other in a rehearsal
    warmup_steps: int = Field(ge=0)
    save: int = Field(gt=0)
    evaluate: int = Field(gt=0)
    router_log: int = Field(gt=0)
    kill_after_step: int = Field(gt=0)
    held_out_tokens: int = Field(gt=0)
    control_rows: int = Field(gt=0)  # held-out conversations whose control tokens are looked at
    answers: int = Field(gt=0)  # held-out prompts that are answered
    max_new_tokens: int = Field(gt=0)  # of an answer
    loss_chunk: int = Field(gt=0)  # tokens whose scores are made at a time
    threads: int = Field(gt=0)  # within an operation: it decides the order of sums

    @model_validator(mode="after")
    def _fits(self) -> SmokeParams:
        if self.global_sequences % (self.processes * self.micro_sequences):
            raise ValueError(
                f"{self.global_sequences} rows do not divide into {self.processes} processes with micro-batches of "
                f"{self.micro_sequences}"
            )
        if not self.save < self.kill_after_step < self.steps or self.warmup_steps >= self.steps:
            raise ValueError("a kill falls after a save and before the end, and the warm-up is not the whole run")
        return self


class Params(ParamsBase):
    """The run that Stage 1's trainer carries out."""

    batch: BatchParams
    loss_weights: SpanWeights
    schedule: ScheduleParams
    optimizer: OptimizerParams
    seeds: SeedParams
    periods: PeriodParams
    evaluation: EvaluationParams
    stop: StopParams
    packing: Literal["document_bounded", "whole_row", "best_fit"]  # what a row holds, and what attention stops at
    teacher: Literal["openai/gpt-oss-120b"]
    later_stages: tuple[LaterStage, ...]
    smoke: SmokeParams
