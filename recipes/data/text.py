"""Text as it comes from outside: what is accepted, what is dropped and counted, what is refused.

Place in the path: rows -> **text** -> token ids. A text is dropped for a stated reason and counted.

Invariants: nothing is dropped without a count; no text is changed, except by the NUL policy `remove`.

Example:
    drops = Counter()
    with open_rows(Path("prose.jsonl"), PROSE_COLUMNS) as source:
        texts = [clean_text(row["text"], nul_policy="drop", drops=drops) for _, row in source.rows()]
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

from vpstore.errors import RecipeRefused

NulPolicy = Literal["drop", "remove", "refuse"]


def surrogate_at(text: str) -> int | None:
    """Index of the first lone surrogate, which no UTF-8 can spell; None if there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def require_scalar_text(text: str, *, where: str) -> None:
    """Refuse text that has no UTF-8 form.

    Raises:  RecipeRefused: a lone surrogate; a tokenizer would replace it without a word.
    """
    at = surrogate_at(text)
    if at is not None:
        raise RecipeRefused(
            "text contains a lone surrogate",
            where=where,
            expected="Unicode scalar values",
            found=f"U+{ord(text[at]):04X} at character {at}",
            next_step="decode the original bytes again, or drop the text",
        )


def clean_text(text: str, *, nul_policy: NulPolicy, drops: Counter[str], where: str = "a text") -> str | None:
    """The text as it is used, or None if it is dropped; either is counted in `drops` under its reason.

    Reasons: `surrogate`, `empty` (nothing but white space), `nul`; and `nul_characters_removed`, which drops nothing.

    Raises:  RecipeRefused: a NUL character under the policy `refuse`.
    """
    text = without_nul(text, nul_policy=nul_policy, drops=drops, where=where)
    reason = _fault(text)
    if reason:
        drops[reason] += 1
        return None
    return text


def without_nul(text: str, *, nul_policy: NulPolicy, drops: Counter[str], where: str) -> str:
    """The text as the policy leaves it: under `drop` as it is, for the caller to drop.

    Raises:  RecipeRefused: a NUL character under the policy `refuse`.
    """
    if "\0" not in text or nul_policy == "drop":
        return text
    if nul_policy == "refuse":
        raise RecipeRefused(
            "a row of a text source is malformed",
            where=where,
            expected="no NUL characters, as params.nul_policy asks",
            found=f"a NUL character in {text[:40]!r}",
            next_step="mend the source, or choose the policy drop or remove",
        )
    drops["nul_characters_removed"] += text.count("\0")
    return text.replace("\0", "")


def is_blank(text: str) -> bool:
    """Whether there is nothing but white space."""
    return not text or text.isspace()


def _fault(text: str) -> str:
    if surrogate_at(text) is not None:
        return "surrogate"
    if is_blank(text):
        return "empty"
    return "nul" if "\0" in text else ""
