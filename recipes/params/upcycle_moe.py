"""Params of the recipe `upcycle_moe`.

Place in the path: **config** -> recipe.

Example:
    >>> Params.model_json_schema()["title"]
    'Params'
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from recipes.model.config import StudentConfig
from recipes.params.base import ParamsBase


class Params(ParamsBase):
    """How the experts are cut from the dense layers, how the router starts, and what must hold."""

    model: StudentConfig  # with moe; all else must be the parent's
    method: Literal["R0", "R1", "R2"]  # R0 exact with a silent routed part, R1 exact with a share of it, R2 ablation
    seed: int
    fc1_noise: float = Field(ge=0)  # relative to the standard deviation of the dense fc1 (R2: of fc2 too)
    drop_fraction: float = Field(ge=0, le=1)  # share of each expert's units that are re-drawn; R0 and R2
    routed_share: float = Field(gt=0, le=1)  # R1 and R2: what the routed experts carry; 0.625 keeps their bits
    router_std: float = Field(gt=0)  # of the router's weights; 0.64 / sqrt(hidden_size) gives logits of that spread
    calibration_tokens: int = Field(gt=0)  # of the training text: mean router inputs, and the router's load
    calibration_sequence: int = Field(gt=0)
    check_tokens: int = Field(gt=0)  # held-out tokens on which the logits are compared
    max_relative_error: float = Field(ge=0)  # of R1's logits
    min_router_entropy: float = Field(ge=0, le=1)  # of each layer's load histogram, relative to ln(num_experts)
    max_expert_load: float = Field(gt=0, le=1)  # share of a layer's picks that its busiest expert may get
