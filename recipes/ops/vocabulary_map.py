"""Which row of a new vocabulary comes from where: a pure function of two vocabularies and a few rules.

Place in the path: the coefficients of a pair of vocabularies, and the transplant that uses them. An *anchor* is a token
whose bytes both vocabularies have.

Invariants: bytes decide, never ids or roles; lists are in the order of the new ids; a control token is an anchor of
nothing: it gets a row only by the map, by OMP if it is named, or the mean.

Example:
    >>> shared = shared_tokens(donor.tokens, target, control_by_omp=(), numbers_by_omp=False)
    >>> len(shared.anchor_ids)
    98863
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from vpstore.errors import RecipeRefused

DIGITS = tuple(str(digit) for digit in range(10))


class Tokens(Protocol):
    """A vocabulary as `recipes.data.vocabulary` reads it."""

    @property
    def tokens(self) -> Sequence[bytes | None]:
        """Bytes by id; None: a control token, or an id without a token."""

    @property
    def special(self) -> Mapping[str, int]:
        """Control tokens."""


@dataclass(frozen=True)
class SharedTokens:
    """What two vocabularies alone say: nothing here knows a donor's ids."""

    anchor_ids: list[int]  # new ids whose bytes the donor has
    combined: list[int]  # new ids for OMP


@dataclass(frozen=True)
class VocabularyMap:
    """Where each row of the new vocabulary comes from; ids that stand in no list get the mean row."""

    anchor_ids: list[int]  # new ids …
    anchor_from: list[int]  # … and the donor's ids of the same bytes
    copied_ids: list[int]  # anchors, then mapped control tokens
    copied_from: list[int]
    numbers: list[tuple[str, int]]  # two- and three-digit numbers to be composed, with their new ids
    combined: list[int]  # ids that have coefficients
    donor_ids: dict[str, int]  # the donor's ids of the digits


def shared_tokens(
    donor: Iterable[bytes | None], target: Tokens, *, control_by_omp: Sequence[str], numbers_by_omp: bool
) -> SharedTokens:
    """Which tokens of the new vocabulary are anchors, and which need coefficients.

    Args:    donor: the bytes of its tokens, in any order. control_by_omp: new control tokens for OMP.
    Raises:  RecipeRefused: a control token that the vocabulary lacks, or no anchors.
    """
    known = {token for token in donor if token is not None}
    anchors = [number for number, token in enumerate(target.tokens) if token is not None and token in known]
    if not anchors:
        raise _refused("the vocabularies share too little", "no anchors", "tokens of the same bytes")
    apart = set(anchors) | (set() if numbers_by_omp else {number for _, number in _numbers(target)})
    combined = [number for number, token in enumerate(target.tokens) if token is not None and number not in apart]
    combined += [_control(target, name, "new") for name in control_by_omp]
    return SharedTokens(anchors, sorted(combined))


def match_vocabularies(
    donor: Tokens, target: Tokens, *, control_tokens: Mapping[str, str], combined: Sequence[int]
) -> VocabularyMap:
    """Sort the new vocabulary's ids by where their rows come from.

    Args:    control_tokens: new control token -> the donor's. combined: ids that have coefficients.
    Raises:  RecipeRefused: a control token that its vocabulary lacks, one that is combined too, no anchors, no digits.
    """
    by_bytes = {token: number for number, token in reversed(list(enumerate(donor.tokens))) if token is not None}
    anchors = [(n, by_bytes[t]) for n, t in enumerate(target.tokens) if t is not None and t in by_bytes]
    copied = [(_control(target, new, "new"), _control(donor, old, "donor's")) for new, old in control_tokens.items()]
    solved = set(combined)
    twice = sorted(name for name in control_tokens if _control(target, name, "new") in solved)
    if twice:
        raise _refused("a control token is both mapped and combined", ", ".join(twice), "one of the two")
    digits = {digit: by_bytes[digit.encode()] for digit in DIGITS if digit.encode() in by_bytes}
    if not anchors or len(digits) < len(DIGITS):
        raise _refused("the vocabularies share too little", f"{len(anchors)} anchors, {len(digits)} digits", "more")
    taken = solved | {number for number, _ in anchors}
    copied = anchors + sorted(copied)
    return VocabularyMap(
        anchor_ids=[new for new, _ in anchors],
        anchor_from=[old for _, old in anchors],
        copied_ids=[new for new, _ in copied],
        copied_from=[old for _, old in copied],
        numbers=[(text, number) for text, number in _numbers(target) if number not in taken],
        combined=list(combined),
        donor_ids=digits,
    )


def _numbers(target: Tokens) -> list[tuple[str, int]]:
    """Tokens of two or three digits."""
    return [
        (token.decode(), number)
        for number, token in enumerate(target.tokens)
        if token is not None and token.isdigit() and 2 <= len(token) <= 3
    ]


def _control(vocabulary: Tokens, name: str, whose: str) -> int:
    if name not in vocabulary.special:
        raise _refused(f"the {whose} vocabulary has no such control token", name, ", ".join(vocabulary.special)[:200])
    return vocabulary.special[name]


def _refused(what: str, found: str, expected: str) -> RecipeRefused:
    return RecipeRefused(
        what,
        where="control_tokens, control_by_omp, the two vocabularies",
        expected=expected,
        found=found,
        next_step="mend the map in the configuration, or name other inputs",
    )
