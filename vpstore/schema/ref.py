"""Refs: the names people type.

Place in the path: the command line and `objects.toml` speak refs; everything behind them speaks digests.
Grammar: `object[.mode][@stage]`, or `object#prefix` with at least 6 hex digits of an artifact's digest.
Invariants: parse and print are inverse; a name never contains a separator of the grammar or of a file system.

Example:
    >>> parse_ref("vpDense0-5_28.real@real-heal").stage
    'real-heal'
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from vpstore.errors import UsageError, VpstoreError

NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}"
_NAME = re.compile(NAME)
_REF = re.compile(rf"({NAME})(?:\.({NAME}))?(?:@({NAME}))?")
MIN_PREFIX: Final = 6  # fewer digits name too many artifacts
MAX_PREFIX: Final = 64  # all of a digest
_PREFIXED = re.compile(rf"({NAME})#([0-9a-f]{{{MIN_PREFIX},{MAX_PREFIX}}})")
_MISPREFIXED = re.compile(rf"({NAME})#([A-Za-z0-9]*)")


@dataclass(frozen=True)
class StageRef:
    """One object at one stage: what a pointer, a lock entry and a view are about."""

    object: str
    stage: str

    def __str__(self) -> str:
        return f"{self.object}@{self.stage}"

    @property
    def slug(self) -> str:
        """The name of the DVC stage and of the pointer's file; `@` is not allowed there."""
        return f"{self.object}-{self.stage}"


@dataclass(frozen=True)
class Ref:
    """What a person typed, parsed but not yet looked up."""

    object: str
    mode: str | None = None
    stage: str | None = None
    prefix: str | None = None  # hex digits of an artifact; excludes mode and stage

    def __str__(self) -> str:
        if self.prefix is not None:
            return f"{self.object}#{self.prefix}"
        return self.object + (f".{self.mode}" if self.mode else "") + (f"@{self.stage}" if self.stage else "")


def parse_ref(text: str, *, where: str = "", error: type[VpstoreError] = UsageError) -> Ref:
    """Read a ref.

    Raises:  error: not of the grammar.
    """
    if match := _REF.fullmatch(text):
        return Ref(match[1], mode=match[2], stage=match[3])
    if match := _PREFIXED.fullmatch(text):
        return Ref(match[1], prefix=match[2])
    if match := _MISPREFIXED.fullmatch(text):
        digits = len(match[2])
        fault = "too short" if digits < MIN_PREFIX else "too long" if digits > MAX_PREFIX else "not lowercase hex"
        raise error(
            f"a digest prefix is {fault}",
            where=where or text,
            expected=f"{MIN_PREFIX} to {MAX_PREFIX} lowercase hex digits after the #",
            found=f"{digits} characters",
            next_step=f"vpstore show {match[1]} prints the whole digest of the one that is built",
        )
    raise error(
        "not a ref",
        where=where,
        expected="object[.mode][@stage] or object#digest-prefix (6 hex digits or more)",
        found=repr(text)[:120],
        next_step="vpstore ls",
    )


def nearest(word: str, known: Iterable[str]) -> str:
    """The known name that a mistyped one most likely means, whatever its capitals; empty if none is near."""
    import difflib  # only a mistake needs it

    lowered = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), lowered, n=1)
    return lowered[found[0]] if found else ""


def check_name(text: str, *, where: str, error: type[VpstoreError] = UsageError) -> str:
    """Hold the name of an object, a stage, a mode or a role against the grammar.

    Raises:  error: empty, too long or with other letters.
    """
    if not _NAME.fullmatch(text):
        raise error(
            "not a name",
            where=where,
            expected="letters, digits, '_' and '-', at most 80",
            found=repr(text)[:100],
            next_step="write a name of these letters there",
        )
    return text
