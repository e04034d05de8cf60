"""`stage1.toml` as a trainer reads it: parsed, and complete before anything is looked up in it.

Place in the path: the run's directory -> **stage1_document** -> stage1_smoke, stage1_inputs. No tensor library: the
number of threads is read here before one is imported.

Invariants: of a document that this returns, every entry that the trainer looks up is there and has its type; whether
the document is the published one is for stage1_inputs to say.

Example:
    threads = read_document(Path("stage1"))["smoke"]["threads"]
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from recipes.params.stage1_handoff import SeedParams, SmokeParams, SpanWeights, StopParams
from recipes.params.training import OptimizerParams
from vpstore.errors import RecipeRefused

RUN_FILE = "stage1.toml"
FORMAT = 1


class _Table(BaseModel):
    """What is looked up; a table may say more, for people and for other trainers."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class _Input(_Table):
    ref: str
    digest: str


class _Inputs(_Table):
    checkpoint: _Input
    data: _Input
    tokenizer: _Input


class _Manifest(_Table):
    path: Literal["manifest.json"]
    digest: str


class _Data(_Table):
    kind: str
    manifest: _Manifest
    packing: Literal["document_bounded", "whole_row", "best_fit"]


class _Loss(_Table):
    weights: SpanWeights


class _Schedule(_Table):
    shape: Literal["cosine", "linear", "constant"]
    final: float


class _Router(_Table):
    balance_loss_weight: float


class _Logging(_Table):
    uniform_entropy: float
    uniform_max_load_percent: float


class _Run(_Table):
    inputs: _Inputs
    model: dict[str, Any]
    tokenizer: dict[str, Any]
    data: _Data
    loss: _Loss
    schedule: _Schedule
    optimizer: dict[str, Any]
    router: _Router
    logging: _Logging
    seeds: SeedParams
    stop: StopParams
    smoke: SmokeParams

    @field_validator("optimizer")
    @classmethod
    def _whole(cls, table: dict[str, Any]) -> dict[str, Any]:
        # Nothing is left to a default here: what the run does not say, its author did not decide.
        known = OptimizerParams.model_fields.keys()
        if missing := sorted(known - table.keys()):
            raise ValueError(f"without {', '.join(missing)}")
        OptimizerParams.model_validate({name: table[name] for name in known})
        return table


def read_document(run: Path) -> dict[str, Any]:
    """The document in the directory of the artifact `stage1`.

    Raises:  RecipeRefused: no such file, another format, no TOML, or an entry that is missing or malformed.
    """
    try:
        data = (run / RUN_FILE).read_bytes()
    except OSError as error:
        raise _refusal("there is no run to carry out", run.name, error) from error
    return parse_document(data)


def parse_document(data: bytes) -> dict[str, Any]:
    """The document in a file's bytes.

    Raises:  RecipeRefused: another format, no TOML, or an entry that is missing or malformed.
    """
    try:
        document = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise _refusal("there is no run to carry out", RUN_FILE, error) from error
    _require_entries(document)
    return document


def _require_entries(document: Mapping[str, Any]) -> None:
    if document.get("format") != FORMAT:
        what, found = "the run is written in another format", str(document.get("format"))
        raise RecipeRefused(what, where="run", expected=str(FORMAT), found=found, next_step=_NEXT)
    try:
        _Run.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeRefused(
            "the run is not complete",
            where=f"{RUN_FILE}: {'.'.join(map(str, first['loc']))}",
            expected=first["msg"],
            found=repr(first["input"])[:200],
            next_step=_NEXT,
        ) from error


_NEXT = "vpstore build stage1"


def _refusal(what: str, where: str, error: Exception) -> RecipeRefused:
    return RecipeRefused(
        what,
        where=where,
        expected="the directory of the artifact stage1",
        found=f"{type(error).__name__}: {error}",
        next_step=_NEXT,
    )
