"""Conversations as token arrays, many at a time: the frame and headers rendered once, the texts encoded by tiktoken.

Place in the path: a SYNTH row as an exchange -> **assembly** -> indexed datasets. What stands around the texts is cut
out of a conversation that openai-harmony rendered; docs/decisions/0010-rendering.md says why, and a gate of the recipe
holds rows assembled here against rows rendered there.

Invariants: without a cut, tokens, loss mask and span are those of `HarmonyRenderer.training`; a cut text begins at a
character; a document has at most `Limits.max_tokens` tokens, the end-of-document token counted.

Example:
    assembler = Assembler(tokenizer, Surroundings.of(renderer, tokenizer), limits)
    tokens, loss_mask, span = arrays_of([assembler.assemble(exchange)])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from recipes.data.conversation import ANALYSIS, FINAL, Exchange, HarmonyRenderer, Rendered
from recipes.data.encodings import O200K_HARMONY
from recipes.data.harmony import HarmonyTokenizer
from recipes.data.truncation import Limits
from vpstore.errors import RecipeRefused

_MESSAGE = O200K_HARMONY.special["<|message|>"]
_ENDS = (O200K_HARMONY.special["<|end|>"], O200K_HARMONY.special["<|return|>"])
_WORDS = Exchange(user="a question", analysis="some thought", final="the answer")


@dataclass(frozen=True)
class Surroundings:
    """The tokens around the three texts, the same for every row."""

    opening: tuple[int, ...]  # up to the user's text
    to_analysis: tuple[int, ...]  # the end of the user's message, the header of the reasoning
    to_final: tuple[int, ...]  # the end of the reasoning, the header of the answer
    closing: tuple[int, ...]  # the end of the answer, the end of the document

    @classmethod
    def of(cls, renderer: HarmonyRenderer, tokenizer: HarmonyTokenizer) -> Surroundings:
        """Cut them out of a rendered conversation.

        Raises:  RecipeRefused: the renderer changes a text, so that this cannot be done.
        """
        tokens = renderer.training(_WORDS).tokens.tolist()
        starts = [place + 1 for place, token in enumerate(tokens) if token == _MESSAGE][-3:]
        pieces, done = [], 0
        for text, start in zip((_WORDS.user, _WORDS.analysis, _WORDS.final), starts, strict=True):
            ids = tokenizer.encode(text)
            pieces.append(tuple(tokens[done:start]))
            done = start + len(ids)
            if tokens[start:done] != ids or tokens[done] not in _ENDS:
                raise RecipeRefused(
                    "the renderer does not keep a text as it is",
                    where="openai-harmony",
                    expected=f"the tokens of {text!r} and the end of the message",
                    found=tokenizer.decode(tokens[start:]),
                    next_step="install the version that constraints.txt names",
                )
        opening, to_analysis, to_final = pieces
        return cls(opening, to_analysis, to_final, tuple(tokens[done:]))

    @property
    def size(self) -> int:
        """How many tokens they are."""
        return len(self.opening) + len(self.to_analysis) + len(self.to_final) + len(self.closing)


class Assembled(NamedTuple):
    """One document; the counts are of tokens without span, of the reasoning's and of the answer's message."""

    tokens: list[int]
    plain: int  # before the reasoning; the end-of-document token comes on top
    analysis: int
    final: int
    analysis_cut: int  # how many tokens of the text are missing
    user_cut: int

    @property
    def is_cut(self) -> bool:
        """Whether a text lost tokens."""
        return self.analysis_cut + self.user_cut > 0


class Assembler:
    """Encodes and puts together."""

    def __init__(self, tokenizer: HarmonyTokenizer, around: Surroundings, limits: Limits) -> None:
        self._tokenizer, self._around, self._limits = tokenizer, around, limits
        self._fixed = around.size

    def assemble(self, exchange: Exchange) -> Assembled | None:
        """The document, cut if it must be; None if the final answer cannot be kept whole.

        Raises:  RecipeRefused: a lone surrogate.
        """
        encode, around = self._tokenizer.encode, self._around
        user, analysis, final = encode(exchange.user), encode(exchange.analysis), encode(exchange.final)
        kept = self._limits.kept(fixed=self._fixed, user=len(user), analysis=len(analysis), final=len(final))
        if kept is None:
            return None
        short_user, short_analysis = self._last(user, kept.user), self._last(analysis, kept.analysis)
        return Assembled(
            [*around.opening, *short_user, *around.to_analysis, *short_analysis, *around.to_final, *final]
            + [*around.closing],
            len(around.opening) + len(short_user) + 1,
            len(around.to_analysis) + len(short_analysis),  # its end for the user's end
            len(around.to_final) + len(final),
            len(analysis) - len(short_analysis),
            len(user) - len(short_user),
        )

    def _last(self, ids: list[int], number: int) -> list[int]:
        """The last `number` ids, or up to three fewer, so that they begin at a character."""
        if number == len(ids):
            return ids
        start = len(ids) - number
        while start < len(ids) and 0x80 <= self._tokenizer.token_bytes(ids[start])[0] < 0xC0:
            start += 1
        return ids[start:]


def arrays_of(documents: Sequence[Assembled]) -> Rendered:
    """The arrays of documents back to back; loss mask and span are shifted inside each document."""
    runs = np.array([(one.plain - 1, one.analysis, one.final, 2) for one in documents], dtype=np.int64).ravel()
    values = np.tile(np.array([0, ANALYSIS, FINAL, 0], dtype=np.uint8), len(documents))
    span: npt.NDArray[np.uint8] = np.repeat(values, runs)
    tokens = np.fromiter(chain.from_iterable(one.tokens for one in documents), dtype=np.int32, count=span.size)
    return Rendered(tokens, (span > 0).astype(np.uint8), span)
