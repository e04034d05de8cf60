"""The exit codes, from the error classes: for `--help` and for the table in the documentation.

Place in the path: beside the command line. Nobody writes a code down twice.

Example:
    python -m vpstore.cli.exit_codes > table.md
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from vpstore.errors import Interrupted, OutputClosed, VpstoreError

_ALWAYS: Final = (Interrupted.exit_code, OutputClosed.exit_code)  # however a command is ended from outside


def exit_codes() -> dict[int, str]:
    """Every exit code and what it means, in order."""
    found = {0: "done"}
    for kind in _kinds(VpstoreError):
        found.setdefault(kind.exit_code, kind.meaning)
    return dict(sorted(found.items()))


def table() -> str:
    """The table of docs, in Markdown."""
    classes: dict[int, list[str]] = {}
    for kind in _kinds(VpstoreError):
        classes.setdefault(kind.exit_code, []).append(f"`{kind.__name__}`")
    rows = [f"| {code} | {meaning} | {', '.join(classes.get(code, []))} |" for code, meaning in exit_codes().items()]
    return "\n".join(["| exit code | meaning | raised as |", "|---|---|---|", *rows]) + "\n"


def epilog(example: str, codes: Sequence[int]) -> str:
    """The end of a command's help: its example and its exit codes."""
    known = exit_codes()
    lines = [f"{code} {known[code]}" for code in sorted({0, 1, 2, *_ALWAYS, *codes})]
    return f"Example: {example}\n\nExit codes: " + " · ".join(lines)


def _kinds(base: type[VpstoreError]) -> Iterator[type[VpstoreError]]:
    yield base
    for kind in base.__subclasses__():
        yield from _kinds(kind)


if __name__ == "__main__":
    print(table(), end="")
