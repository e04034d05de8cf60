"""Knobs that every training recipe has: steps, rows, rates, loss, thresholds.

Place in the path: **config** -> recipe. Pure data. `OptimizerParams` keeps the published constants as defaults; what
differs between profiles has none.

Example:
    >>> ScheduleParams(warmup_steps=2, shape="cosine", final=0.1).final
    0.1
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from recipes.params.base import ParamsBase


class ScheduleParams(ParamsBase):
    """Linear warm-up, then a fall to `final` times the peak rate."""

    warmup_steps: int = Field(ge=0)
    shape: Literal["cosine", "linear", "constant"]
    final: float = Field(ge=0, le=1)


class OptimizerParams(ParamsBase):
    """NorMuon for matrices, AdamW for the others. A frequency and a residual logit are never decayed."""

    matrix_rate: float = Field(ge=0)  # RMS of the update is about 1/sqrt(max(rows, columns)): 6 times AdamW's rate
    embedding_rate: float = Field(ge=0)
    head_rate: float = Field(ge=0)
    vector_rate: float = Field(ge=0)  # biases, norms, softmax offsets
    frequency_rate: float = Field(ge=0)
    residual_rate: float = Field(ge=0)
    matrix_decay: float = Field(ge=0)
    table_decay: float = Field(ge=0)  # embedding and head
    clip_norm: float = Field(gt=0)
    momentum: float = Field(0.95, ge=0, lt=1)
    normuon_beta: float = Field(0.95, ge=0, lt=1)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    orthogonal_dtype: Literal["float32", "bfloat16"] = "float32"


class LossParams(ParamsBase):
    """`plain`: mean over all counted tokens. `span`: weighted sum of the means over plain, reasoning and final."""

    kind: Literal["plain", "span"]
    span_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    chunk: int = Field(gt=0)  # tokens whose scores are made at a time


class SpikeParams(ParamsBase):
    """A step is a spike if its loss is above `factor` times the median of the last `window` losses."""

    window: int = Field(gt=1)
    factor: float = Field(gt=1)


class TrainingParams(ParamsBase):
    """One run of the loop."""

    steps: int = Field(gt=0)
    sequence_length: int = Field(gt=1)
    sequences: int = Field(gt=0)  # rows of the global batch
    micro_sequences: int = Field(gt=0)  # rows that are in memory at a time; changes rounding only
    seed: int
    save_every_steps: int = Field(gt=0)  # below `steps`; the last step needs none
    # Of the matrix products and what flows between them. Weights, norms, routers, softmax, frequencies and the loss are
    # float32 in both; float32 is the reference.
    precision: Literal["float32", "bfloat16"] = "float32"
    recompute: bool = False  # activations again in the backward pass instead of keeping them
    # The stream of documents in slices, attention and positions inside a document or through the whole row; or whole
    # documents packed by best fit, attention and positions inside each.
    packing: Literal["document_bounded", "whole_row", "best_fit"] = "document_bounded"
    schedule: ScheduleParams
    optimizer: OptimizerParams
    loss: LossParams
    spikes: SpikeParams

    @model_validator(mode="after")
    def _rows(self) -> TrainingParams:
        if self.sequences % self.micro_sequences:
            raise ValueError(f"{self.sequences} rows do not divide into micro-batches of {self.micro_sequences}")
        if self.schedule.warmup_steps > self.steps:
            raise ValueError(f"a warm-up of {self.schedule.warmup_steps} steps does not fit into {self.steps}")
        if self.save_every_steps >= self.steps > 1:
            raise ValueError(f"a state every {self.save_every_steps} steps is never saved in {self.steps} steps")
        return self


class NumericParams(ParamsBase):
    """Prompts with numbers, teacher-forced, held against the parent's own figures."""

    three_digit_stride: int = Field(gt=0)  # 1: all numbers from 000 to 999
    accuracy_margin: float = Field(ge=0)  # the share of right answers may fall by this much
    nll_margin: float = Field(ge=0)  # nats a token by which the answers may become less likely
    measurable_accuracy: float = Field(ge=0, le=1)  # below this the parent's answers are chance
    measurable_gain: float = Field(ge=0)  # nats a token by which the right prompt must help the parent


class HarmonyParams(ParamsBase):
    """Whether the conversation format is spoken."""

    mode: Literal["control_token_accuracy", "sampled"]
    threshold: float = Field(ge=0, le=1)
    rows: int = Field(gt=0)  # held-out conversations that are looked at
    max_new_tokens: int = Field(0, ge=0)  # of a sampled answer


class HeldOutParams(ParamsBase):
    """Loss on text that was never trained on."""

    tokens: int = Field(gt=0)
    sequence_length: int = Field(gt=1)
    improvement: float  # nats a token by which the result must be better than the parent


class RouterParams(ParamsBase):
    """When a layer of experts has collapsed."""

    max_dead: float = Field(ge=0, le=1)  # share of a layer's experts without a token
    max_load: float = Field(gt=0, le=1)  # share of a layer's picks that its busiest expert may get


class GateParams(ParamsBase):
    """Thresholds of a training stage; `router` only counts for models with experts."""

    max_spikes: int = Field(ge=0)
    numeric: NumericParams
    harmony: HarmonyParams
    held_out: HeldOutParams
    router: RouterParams
