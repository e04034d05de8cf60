"""What commands put on stdout: one JSON document, or lines and tables for people.

Place in the path: the last step of every command. Data goes to stdout; everything else is the narrator's.
Invariants: with `--json` stdout is exactly one document that begins with its schema version, also for an error.

Example:
    print_json({"path": "weights/tiny/..."}); print_table(("object", "size"), rows)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from vpstore.errors import VpstoreError
from vpstore.narration import printable

if TYPE_CHECKING:
    from vpstore.schema.reproduction import Outcome

SCHEMA: Final = 1


def print_json(document: dict[str, Any]) -> None:
    """One versioned document."""
    text = json.dumps({"schema": SCHEMA, **document}, indent=2, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:  # a path whose bytes are not UTF-8: as escapes, which JSON can hold
        text = json.dumps({"schema": SCHEMA, **document}, indent=2, default=str)
    click.echo(text)


def error_document(error: VpstoreError) -> dict[str, Any]:
    """An error as JSON."""
    return {
        "error": {
            "kind": type(error).__name__,
            "exit_code": error.exit_code,
            "what": error.what,
            "where": error.where,
            "expected": error.expected,
            "found": error.found,
            "next_step": error.next_step,
        }
    }


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell; the last one is not padded."""
    shown = [[printable(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in shown) for column in range(len(head))]
    for row in shown:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())


def size_text(size_bytes: int | None) -> str:
    """Bytes for people, three digits."""
    if size_bytes is None:
        return "?"
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def seconds_text(seconds: float | None) -> str:
    """A duration for people."""
    return "?" if seconds is None else f"{seconds:.1f} s"


def outcome_text(outcome: Outcome) -> str:
    """What came out of building an artifact again, in a few words."""
    part = "whole" if outcome.method == "whole" else f"{outcome.tensors} of {outcome.tensors_total} tensors"
    given = f", {len(outcome.given_intermediates)} intermediates given" if outcome.given_intermediates else ""
    if not outcome.total_bytes:
        return f"{outcome.result}, {part}, no tensors"
    share = outcome.proved_bytes / outcome.total_bytes
    return f"{outcome.result}, {part}{given}, {share:.1%} of the tensor bytes identical"


def figure_text(figure: Any) -> str:
    """A figure of the summary column."""
    if figure is None:
        return "-"
    return f"{figure:.4f}" if isinstance(figure, float) else str(figure)
