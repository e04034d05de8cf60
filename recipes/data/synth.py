"""Rows in the schema of PleIAs/SYNTH: which are used, which are dropped and why.

Place in the path: a JSON-lines file -> **synth** -> conversation -> indexed datasets.

Invariants: a row is used only if query, reasoning and answer all say something; what is dropped is counted under its
reason; control-token look-alikes inside a text are no reason, since they stay text.

Example:
    drops = Counter()
    exchange = exchange_of(row, drops=drops)  # None if the row is dropped

Source: the columns of the public dataset PleIAs/SYNTH (its dataset card).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from recipes.data.conversation import Exchange
from recipes.data.harmony import has_long_blanks
from recipes.data.text import surrogate_at

COLUMNS = (
    "synth_id",
    "language",
    "exercise",
    "model",
    "query",
    "query_seed_url",
    "query_seed_text",
    "additional_seed_url",
    "seed_license",
    "constraints",
    "script",
    "synthetic_reasoning",
    "synthetic_answer",
    "words",
)
# What the pipeline reads; the other columns are carried along and never needed.
USED = ("synth_id", "query", "synthetic_reasoning", "synthetic_answer")
_TEXTS = USED[1:]


def exchange_of(row: Mapping[str, Any], *, drops: Counter[str]) -> Exchange | None:
    """The row as a conversation, or None if it is dropped, counted in `drops`.

    Reasons: `surrogate`, `nul`, `empty_<column>` (nothing but white space), `long_blanks`.
    """
    reason = _fault(row)
    if reason:
        drops[reason] += 1
        return None
    return Exchange(user=row["query"], analysis=row["synthetic_reasoning"], final=row["synthetic_answer"])


def _fault(row: Mapping[str, Any]) -> str:
    if any(isinstance(value, str) and surrogate_at(value) is not None for value in row.values()):
        return "surrogate"
    for column in USED:
        if "\0" in row[column]:
            return "nul"
        if not row[column].strip():
            return f"empty_{column}"
    return "long_blanks" if any(has_long_blanks(row[column]) for column in _TEXTS) else ""
