"""Text as it comes from outside: what is accepted, what is dropped and counted, what is refused.

Place in the path: corpus file -> **text** -> token ids. A row is dropped for a stated reason and counted; a file
that is not what it claims to be is refused as a whole.

Invariants: the rows keep the file's order; nothing is dropped without a count; no text is changed, except by the
NUL policy `remove`.

Example:
    drops = Counter()
    with RowFile(Path("prose.jsonl"), required=("doc_id", "text")) as source:
        texts = [clean_text(row["text"], nul_policy="drop", drops=drops) for _, row in source.rows()]
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

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


class RowFile:
    """A JSON-lines file whose rows can be read in order, and again one by one from their offsets."""

    def __init__(self, path: Path, *, required: tuple[str, ...]) -> None:
        """Open the file.

        Args:    required: keys that every row has, with a string as value; other keys are free.
        Raises:  RecipeRefused: unreadable file.
        """
        self.path, self._required = path, required
        try:
            self._handle = path.open("rb")
        except OSError as error:
            raise RecipeRefused(
                "a text source cannot be read",
                where=path.name,
                expected="a JSON-lines file",
                found=error.strerror or type(error).__name__,
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._handle.close()

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Offset and row, from the first to the last.

        Raises:  RecipeRefused: invalid UTF-8 or JSON, a row that is no object or lacks a key, with its line.
        """
        offset = 0
        self._handle.seek(0)
        for number, line in enumerate(self._handle, start=1):
            yield offset, _parse_row(line, self._required, where=f"{self.path.name}, line {number}")
            offset += len(line)

    def row_at(self, offset: int) -> dict[str, Any]:
        """The row that starts at an offset of `rows`."""
        self._handle.seek(offset)
        return _parse_row(self._handle.readline(), self._required, where=f"{self.path.name}, byte {offset}")


def _parse_row(line: bytes, required: tuple[str, ...], *, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError as error:  # both UnicodeDecodeError and JSONDecodeError
        raise _bad_row(where, "one JSON object in UTF-8", str(error)) from error
    if not isinstance(row, dict):
        raise _bad_row(where, "one JSON object", type(row).__name__)
    for key in required:
        if not isinstance(row.get(key), str):
            raise _bad_row(
                where, f"a string under {key!r}", type(row.get(key)).__name__ if key in row else "no such key"
            )
    return row


def _bad_row(where: str, expected: str, found: str) -> RecipeRefused:
    return RecipeRefused(
        "a row of a text source is malformed",
        where=where,
        expected=expected,
        found=found[:200],
        next_step="restore the file: its provenance names the digest it should have",
    )


def clean_text(text: str, *, nul_policy: NulPolicy, drops: Counter[str]) -> str | None:
    """The text as it is used, or None if it is dropped; either is counted in `drops` under its reason.

    Reasons: `surrogate`, `empty` (nothing but white space), `nul`; and `nul_characters_removed`, which drops nothing.

    Raises:  RecipeRefused: a NUL character under the policy `refuse`.
    """
    if nul_policy == "remove" and "\0" in text:
        drops["nul_characters_removed"] += text.count("\0")
        text = text.replace("\0", "")
    reason = _fault(text)
    if reason == "nul" and nul_policy == "refuse":
        raise _bad_row("a text", "no NUL characters, as params.nul_policy asks", "a NUL character")
    if reason:
        drops[reason] += 1
        return None
    return text


def _fault(text: str) -> str:
    if surrogate_at(text) is not None:
        return "surrogate"
    if not text.strip():
        return "empty"
    return "nul" if "\0" in text else ""
