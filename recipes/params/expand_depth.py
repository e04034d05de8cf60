"""Params of the recipe `expand_depth`.

Place in the path: **config** -> recipe.

Example:
    >>> Params.model_json_schema()["title"]
    'Params'
"""

from __future__ import annotations

from pydantic import Field

from recipes.model.config import StudentConfig
from recipes.params.base import ParamsBase


class Params(ParamsBase):
    """How deep the model becomes, and how its new layers start."""

    model: StudentConfig  # the deeper model; all but num_layers must be the parent's
    inserted_value_residual: float  # logit of an inserted layer's lambda; the old layers keep theirs
    check_tokens: int = Field(gt=0)  # held-out tokens on which the logits must be equal
    depth_map: tuple[int, ...] | None = None  # new place of each old layer; None: the role-preserving map
