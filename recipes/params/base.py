"""The base of every recipe's Params: frozen, strict, no unknown key.

Place in the path: **config** -> recipe. Params are pure data: the resolved values go into the build key, so nothing may
be computed here that a recipe would then use.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ParamsBase(BaseModel):
    """Frozen and strict: an integer is not a string, an unknown key is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
