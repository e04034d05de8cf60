"""What a verb tells the person who waits: warnings always, notes and progress only on a terminal.

Place in the path: handed down from the command line; verbs never print. Data goes to stdout, everything here to stderr.

Example:
    narrator.warn("vpMoE@smoke is stale: its code changed since it was built")
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Final, Protocol, TextIO

_MIB: Final = 1 << 20


def printable(text: object) -> str:
    """Text that somebody else wrote, on one line: what moves a cursor or turns text round stands there as an escape."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))


def printable_lines(text: object) -> str:
    """The same of several lines, which stay lines."""
    return "\n".join(map(printable, str(text).split("\n")))


class Narrator(Protocol):
    """Receives warnings, notes and progress."""

    def warn(self, text: str) -> None:
        """Say what a person must know, also in a log."""

    def note(self, text: str) -> None:
        """Say what a person at a terminal may like to know."""

    def progress(self, label: str, done: int, total: int) -> None:
        """`done` of `total` steps of `label` are finished."""

    def transfer(self, label: str, done_bytes: int, total_bytes: int) -> None:
        """So many bytes of a transfer have moved; one thread calls at a time."""


class Silent:
    """Says nothing; keeps the warnings, for programs that want to look at them."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        """Keep it."""
        self.warnings.append(text)

    def note(self, text: str) -> None:
        """Nothing."""

    def progress(self, label: str, done: int, total: int) -> None:
        """Nothing."""

    def transfer(self, label: str, done_bytes: int, total_bytes: int) -> None:
        """Nothing."""


class Console:
    """Writes to stderr; progress overwrites one line, at most ten times a second, with the time left."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._is_terminal = self._stream.isatty()
        self._label, self._began, self._drawn = "", 0.0, 0.0

    def warn(self, text: str) -> None:
        """Print it wherever stderr goes."""
        self._clear()
        print(f"warning: {printable_lines(text)}", file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """Print it on a terminal."""
        if self._is_terminal:
            self._clear()
            print(printable_lines(text), file=self._stream, flush=True)

    def progress(self, label: str, done: int, total: int) -> None:
        """Redraw the line."""
        self._draw(label, done, total, lambda seconds: f"{done}/{total}")

    def transfer(self, label: str, done_bytes: int, total_bytes: int) -> None:
        """Redraw the line, with the rate since the transfer began."""

        def text(seconds: float) -> str:
            rate = done_bytes / seconds if seconds > 0 else 0.0
            return f"{done_bytes / _MIB:.1f}/{total_bytes / _MIB:.1f} MiB  {rate / _MIB:.1f} MiB/s"

        self._draw(label, done_bytes, total_bytes, text)

    def _draw(self, label: str, done: int, total: int, text: Callable[[float], str]) -> None:
        now = time.monotonic()
        if not self._is_terminal or (done < total and label == self._label and now - self._drawn < 0.1):
            return
        if label != self._label:
            self._label, self._began = label, now
        self._drawn = now
        left = (now - self._began) * (total - done) / done if done else 0.0
        line = f"{printable(label)}  {text(now - self._began)}  {left:.0f} s left"
        print(f"\r\x1b[K{line}", end="", file=self._stream, flush=True)
        if done >= total:
            self._clear()

    def _clear(self) -> None:
        if self._is_terminal and self._label:
            print("\r\x1b[K", end="", file=self._stream, flush=True)
        self._label = ""
