"""How much of a conversation is kept when it is longer than the limit: the structured truncation.

Place in the path: token ids of the three texts -> **truncation** -> assembly.

Invariants: the final answer is kept whole or the row is dropped; the reasoning is cut before the question is; both are
cut from the left, since what stands nearest to the answer leads to it, and a question most often ends with what is
asked; of either, at least its floor is kept, or all of it if it is shorter.

Example:
    >>> Limits(max_tokens=100, min_analysis_tokens=8, min_user_tokens=8).kept(fixed=20, user=10, analysis=90, final=30)
    Kept(user=10, analysis=40)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Kept(NamedTuple):
    """How many tokens stay, counted from the end of each text."""

    user: int
    analysis: int


@dataclass(frozen=True)
class Limits:
    """max_tokens: of a whole document, with all that is not text. The floors say what must be left of a cut text."""

    max_tokens: int
    min_analysis_tokens: int
    min_user_tokens: int

    def kept(self, *, fixed: int, user: int, analysis: int, final: int) -> Kept | None:
        """What is kept of a document, or None if the final answer cannot be kept whole.

        Args:    fixed: tokens that belong to no text; user, analysis, final: tokens of the texts.
        """
        room = self.max_tokens - fixed - final  # for user and analysis
        if user + analysis <= room:
            return Kept(user, analysis)
        analysis_floor = min(analysis, self.min_analysis_tokens)
        if user + analysis_floor <= room:
            return Kept(user, room - user)
        if min(user, self.min_user_tokens) + analysis_floor <= room:
            return Kept(room - analysis_floor, analysis_floor)
        return None
