"""Knobs of `recipes.embedded_donor`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from recipes.model.config import DonorConfig
from recipes.params.base import ParamsBase


class Optimizer(ParamsBase):
    """Muon for the matrices of the layers, AdamW for the embedding and the gains."""

    matrix_rate: float = Field(gt=0)
    embedding_rate: float = Field(gt=0)
    gain_rate: float = Field(gt=0)
    matrix_decay: float = Field(ge=0)
    embedding_decay: float = Field(ge=0)
    momentum: float = Field(gt=0, lt=1)
    betas: tuple[float, float]
    clip_norm: float = Field(gt=0)
    warmup: int = Field(ge=0)  # steps


class Params(ParamsBase):
    """One training run.

    `evaluated` names the source whose held-out documents are measured; `copies` says how often an epoch has the
    documents of a source, once where it says nothing.
    """

    donor: DonorConfig
    optimizer: Optimizer
    steps: int = Field(gt=0)
    sequence_length: int = Field(gt=1)
    sequences: int = Field(gt=0)  # rows a step
    embedding_std: float = Field(gt=0)  # of the drawn weights
    matrix_std: float = Field(gt=0)
    seed: int
    held_out_fraction: float = Field(ge=0, lt=1)
    evaluated: str
    copies: dict[str, int]
    evaluations: int = Field(gt=0)  # points of the held-out curve, the last one after the last step
    loss_chunk: int = Field(gt=0)  # rows of logits in memory at a time
    precision: Literal["float32", "bfloat16"] = "bfloat16"  # of the matrix products
