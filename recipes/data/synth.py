"""Rows in the schema of PleIAs/SYNTH: which are used, which are dropped and why.

Place in the path: rows -> **synth** -> conversation -> indexed datasets.

Invariants: a row is used only if query, reasoning and answer all say something; what is dropped is counted under its
reason; control-token look-alikes inside a text are no reason, since they stay text.

Example:
    drops = Counter()
    exchange = exchange_of(row, drops=drops)  # None if the row is dropped

Source: the columns of the public dataset PleIAs/SYNTH (its dataset card).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from recipes.data.conversation import Exchange
from recipes.data.encodings import O200K_ALIASES, O200K_HARMONY
from recipes.data.harmony import has_long_blanks
from recipes.data.row_reader import Columns
from recipes.data.text import NulPolicy, is_blank, surrogate_at, without_nul

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
SYNTH_COLUMNS: Columns = (("synth_id",), ("query",), ("synthetic_reasoning",), ("synthetic_answer",))
USED = tuple(own for own, *_ in SYNTH_COLUMNS)
_TEXTS = USED[1:]
_CONTROL = re.compile("|".join(map(re.escape, (*O200K_HARMONY.special, *O200K_ALIASES))))


def exchange_of(
    row: Mapping[str, str], *, drops: Counter[str], nul_policy: NulPolicy = "drop", where: str = "a row"
) -> Exchange | None:
    """The row as a conversation, or None if it is dropped, counted in `drops`.

    Reasons: `surrogate`, `nul`, `empty_<column>` (nothing but white space), `long_blanks`; and
    `nul_characters_removed`, which drops nothing.

    Raises:  RecipeRefused: a NUL character under the policy `refuse`.
    """
    texts = [without_nul(row[column], nul_policy=nul_policy, drops=drops, where=where) for column in USED]
    reason = _fault(texts)
    if reason:
        drops[reason] += 1
        return None
    _, user, analysis, final = texts
    return Exchange(user, analysis, final)


def has_control_text(exchange: Exchange) -> bool:
    """Whether a text spells a control token; it stays text and is never encoded as one."""
    texts = (exchange.user, exchange.analysis, exchange.final)
    return any("<|" in text and _CONTROL.search(text) for text in texts)


def _fault(texts: Sequence[str]) -> str:
    if surrogate_at("".join(texts)) is not None:
        return "surrogate"
    for column, text in zip(USED, texts, strict=True):
        if "\0" in text:
            return "nul"
        if is_blank(text):
            return f"empty_{column}"
    return "long_blanks" if any(map(has_long_blanks, texts)) else ""
