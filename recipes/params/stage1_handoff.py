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
    """A stage that starts from Stage 1's result; out of scope here, its contract is not."""

    name: str
    tokens: int = Field(gt=0)
    objective: str


class Params(ParamsBase):
    """The run that Stage 1's trainer carries out."""

    batch: BatchParams
    loss_weights: SpanWeights
    schedule: ScheduleParams
    optimizer: OptimizerParams
    seeds: SeedParams
    periods: PeriodParams
    stop: StopParams
    packing: Literal["document_bounded"]  # attention and positions inside documents, structured truncation
    teacher: Literal["openai/gpt-oss-120b"]
    later_stages: tuple[LaterStage, ...]
